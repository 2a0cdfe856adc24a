"""The embedded default: a corpus and a pretrained small Llama that this project makes itself and keeps in a cache.

    python -m slicetune.engine.tiny        # makes both sizes, prints sample translations and BLEU

Folders carry a hash of what made them, so a changed generator or trainer makes new ones. The model takes 150 s of CPU
time on two threads.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from . import prompts, tiny_corpus, tiny_grammar, tiny_lexicon, tiny_pairs, tiny_pretrain
from .cache import cached
from .errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

GENERATOR = (tiny_lexicon, tiny_grammar, tiny_corpus)


def corpus_dir() -> Path:
    """Folder of the generated corpus (`<dir>/de-en/<domain>/<split>.jsonl.gz`); made on the first call, in seconds.

    Raises UserError when the cache folder cannot be written.
    """
    return cached(f"tiny-corpus-{_digest(*GENERATOR)}", tiny_corpus.write)


def model_dir(size: str = "tiny") -> Path:
    """Hugging Face folder (model and tokenizer) of the pretrained Llama; the first call trains it on two CPU threads.

    `size`: "tiny" (under two minutes), or "test" (seconds; barely trained, for unit tests). Its prompt is `short`.
    Raises UserError when the size is unknown or the cache folder cannot be written.
    """
    if size not in tiny_pretrain.SIZES:
        raise UserError(f"tiny model size {size!r}: choose {' or '.join(tiny_pretrain.SIZES)}")
    corpus = corpus_dir()
    digest = _digest(*GENERATOR, tiny_pretrain, text=tiny_pretrain.chat("it", "", ""))  # the prompt's wording too
    return cached(f"tiny-llama-{size}-{digest}", lambda folder: tiny_pretrain.build(corpus, folder, size))


def pairs_dir() -> Path:
    """Hugging Face folder of the Llama that translates both ways; the first call trains it, two minutes on two cores.

    Raises UserError when the cache folder cannot be written.
    """
    corpus = corpus_dir()
    wording = "".join((prompts.SYSTEMS["short"], *prompts.TEMPLATES))
    digest = _digest(*GENERATOR, tiny_pretrain, tiny_pairs, text=wording)
    return cached(f"tiny-llama-pairs-{digest}", lambda folder: tiny_pairs.build(corpus, folder))


def _digest(*modules: ModuleType, text: str = "") -> str:
    """Hash of the modules' source: a changed generator or trainer never meets what its predecessor cached."""
    digest = hashlib.sha256(text.encode())
    for module in modules:
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()[:12]


def main() -> None:
    """Make corpus and both models; print a few translations and the BLEU of greedy decoding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"corpus  {corpus_dir()}")
    for size in tiny_pretrain.SIZES:
        folder = model_dir(size)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        weights = sum(weight.numel() for weight in model.parameters())
        print(f"model   {folder}: {weights:,} parameters")
        _show(model, AutoTokenizer.from_pretrained(folder), 0 if size == "test" else 2)


def _show(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, samples: int) -> None:
    from . import corpus, evaluation, translation
    from .config import DataConfig

    data = DataConfig(prompt="short")
    for domain in (*data.domains, tiny_grammar.GENERAL):
        pairs = corpus.load_domain(data, domain, "test")
        prompt = prompts.resolve(data)
        lines = translation.translate(model, tokenizer, prompt, pairs, batch_size=50, max_new_tokens=64)
        scores = evaluation.score_domain(lines, [pair.target for pair in pairs], "en")
        print(f"  {domain:10} BLEU {scores['bleu']:5.1f}")
        for pair, line in list(zip(pairs, lines, strict=True))[:samples]:
            print(f"    {pair.source}\n      model      {line}\n      reference  {pair.target}")


if __name__ == "__main__":
    main()
