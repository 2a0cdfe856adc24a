"""Sentence pairs as examples: prompts.py words them, tokenizer/ makes ids of them; too long ones are dropped here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from . import prompts
from .batching import Example
from .config import DataConfig
from .records import Pair


def encode_pairs(
    tokenizer: Any,
    data: DataConfig,
    pairs: Sequence[Pair],
    groups: Sequence[str],
    split: str,
    max_length: int,
    seed: int = 0,
) -> tuple[list[Example], Counter[str]]:
    """Tokenise `pairs`, of the direction `data.pair`, in their order; `Example.group` counts `groups` from 0.

    `seed` is that of --data.prompt templates. Sentences are dropped whole, never cut. The counter says how many and
    why: "<domain>: <reason>" → sentences.
    """
    prompt, kept, dropped = prompts.resolve(data, seed), [], Counter[str]()
    number = {name: i for i, name in enumerate(groups)}
    for pair in pairs:
        ids, start = prompts.encode(tokenizer, prompt, pair)
        name = data.name(pair.domain)
        if start >= max_length:
            dropped[f"{name}: the prompt alone has {max_length} tokens or more"] += 1
        elif len(ids) > max_length:
            dropped[f"{name}: longer than {max_length} tokens"] += 1
        elif not 0 < start < len(ids):
            dropped[f"{name}: no token to predict"] += 1
        else:
            group = number[data.pair if data.pairs else pair.domain]
            kept.append(Example(ids, start, group, f"{name}/{split}/{pair.index}"))
    return kept, dropped


def template_of(tokenizer: Any) -> str:
    """What makes prompts of sentence pairs with this tokenizer, in words."""
    return "chat template" if tokenizer.chat_template else "plain template (the tokenizer has no chat template)"


def show(tokenizer: Any, example: Example, how: str = "") -> str:
    """One sample decoded, the tokens that are predicted between ⟦ and ⟧; `how` says how its prompt was made."""
    ids, start = example.input_ids, example.target_start
    return (
        f"a sample, ⟦what is predicted⟧: {example.uid}, {how}{start} tokens and {len(ids) - start} predicted\n"
        f"{tokenizer.decode(ids[:start])}⟦{tokenizer.decode(ids[start:])}⟧"
    )
