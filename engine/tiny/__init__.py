"""The embedded default: a corpus and a pretrained small Llama that this project makes itself and keeps in a cache.

    python -m slicetune.engine.tiny        # makes both sizes, prints sample translations and BLEU

Folders carry a hash of what made them, so a changed generator or trainer makes new ones. The model takes 150 s of CPU
time on two threads.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import ModuleType

from .. import prompts
from ..cache import cached
from ..errors import UserError
from . import corpus, grammar, lexicon, pairs, pretrain

GENERATOR = (lexicon, grammar, corpus)


def corpus_dir() -> Path:
    """Folder of the generated corpus (`<dir>/de-en/<domain>/<split>.jsonl.gz`); made on the first call, in seconds.

    Raises UserError when the cache folder cannot be written.
    """
    return cached(f"tiny-corpus-{_digest(*GENERATOR)}", corpus.write)


def model_dir(size: str = "tiny") -> Path:
    """Hugging Face folder (model and tokenizer) of the pretrained Llama; the first call trains it on two CPU threads.

    `size`: "tiny" (under two minutes), or "test" (seconds; barely trained, for unit tests). Its prompt is `short`.
    Raises UserError when the size is unknown or the cache folder cannot be written.
    """
    if size not in pretrain.SIZES:
        raise UserError(f"tiny model size {size!r}: choose {' or '.join(pretrain.SIZES)}")
    texts = corpus_dir()
    digest = _digest(*GENERATOR, pretrain, text=pretrain.chat("it", "", ""))  # the prompt's wording too
    return cached(f"tiny-llama-{size}-{digest}", lambda folder: pretrain.build(texts, folder, size))


def pairs_dir() -> Path:
    """Hugging Face folder of the Llama that translates both ways; the first call trains it, two minutes on two cores.

    Raises UserError when the cache folder cannot be written.
    """
    texts = corpus_dir()
    wording = "".join((prompts.SYSTEMS["short"], *prompts.TEMPLATES))
    digest = _digest(*GENERATOR, pretrain, pairs, text=wording)
    return cached(f"tiny-llama-pairs-{digest}", lambda folder: pairs.build(texts, folder))


def _digest(*modules: ModuleType, text: str = "") -> str:
    """Hash of the modules' source: a changed generator or trainer never meets what its predecessor cached."""
    digest = hashlib.sha256(text.encode())
    for module in modules:
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()[:12]
