"""The embedded default: a corpus and a pretrained small Llama that this project makes itself and keeps in a cache.

    slicetune tiny        # makes both sizes, prints sample translations and BLEU

Folders carry a version: raise it when what is made changes, and new ones are made. The model takes 150 s of CPU
time on two threads.
"""

from __future__ import annotations

from pathlib import Path

from ...common.errors import UserError
from ...common.files import cached
from . import corpus, pairs, pretrain

CORPUS_VERSION = 1
"""Of the sentences: lexicon.py, grammar.py and corpus.py."""
MODEL_VERSION = f"{CORPUS_VERSION}.1"
"""Of the models: pretrain.py, pairs.py, and the wording of the prompts that they learn."""


def corpus_dir() -> Path:
    """Folder of the generated corpus (`<dir>/de-en/<domain>/<split>.jsonl.gz`); made on the first call, in seconds.

    Raises UserError when the cache folder cannot be written.
    """
    return cached(f"tiny-corpus-{CORPUS_VERSION}", corpus.write)


def model_dir(size: str = "tiny") -> Path:
    """Hugging Face folder (model and tokenizer) of the pretrained Llama; the first call trains it on two CPU threads.

    `size`: "tiny" (under two minutes), or "test" (seconds; barely trained, for unit tests). Its prompt is `short`.
    Raises UserError when the size is unknown or the cache folder cannot be written.
    """
    if size not in pretrain.SIZES:
        raise UserError(f"tiny model size {size!r}: choose {' or '.join(pretrain.SIZES)}")
    texts = corpus_dir()
    return cached(f"tiny-llama-{size}-{MODEL_VERSION}", lambda folder: pretrain.build(texts, folder, size))


def pairs_dir() -> Path:
    """Hugging Face folder of the Llama that translates both ways; the first call trains it, two minutes on two cores.

    Raises UserError when the cache folder cannot be written.
    """
    texts = corpus_dir()
    return cached(f"tiny-llama-pairs-{MODEL_VERSION}", lambda folder: pairs.build(texts, folder))
