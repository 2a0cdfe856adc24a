"""The embedded model of two directions, German→English and English→German: `--model.path tiny-pairs`.

Pretrained as the default is (pretrain.py), on the same corpus read both ways, half of it under the `short` prompt
and half under the ten instructions of --data.prompt templates; two thirds of the default's sentences a direction.
"""

from __future__ import annotations

from itertools import count
from pathlib import Path

from .. import draws, languages, prompts
from . import corpus, pretrain
from .grammar import GENERAL, Text
from .pretrain import Size

SIZE = Size(128, 384, 4, 4, phrases=2000, general=6000, plain=700, own=700)


def build(folder: Path, out: Path, size: Size = SIZE) -> None:
    """Train tokenizer and model on the corpus folder and save both to `out`."""
    number = count()
    phrases = corpus.phrases(size.phrases, seed=1)
    lessons = [text for pair in phrases for text in both(GENERAL, pair, next(number))]
    texts = [text for domain, pair in pretrain.mixture(folder, size) for text in both(domain, pair, next(number))]
    pretrain.train(lessons, texts, out, size)


def both(domain: str, pair: Text, number: int) -> tuple[str, str]:
    """A sentence in both directions, each under a system text that `number` draws."""
    sides = ("German", pair.de), ("English", pair.en)
    forth, back = (_chat(domain, *order, (number, turned)) for turned, order in enumerate((sides, sides[::-1])))
    return forth, back


def _chat(domain: str, source: tuple[str, str], target: tuple[str, str], key: tuple[int, int]) -> str:
    texts = (prompts.SYSTEMS["short"],) * len(prompts.TEMPLATES) + prompts.TEMPLATES
    named = languages.DOMAINS.get(domain, domain)
    system = texts[draws.draw(len(texts), "tiny-pairs", *key)].format(src=source[0], tgt=target[0], domain=named)
    return f"<|bos|><|system|>{system}<|user|>{source[0]}: {source[1]}<|assistant|>{target[0]}: {target[1]}<|eot|>"
