"""Tokenised sentences into batches, and the order in which training reads them.

Prompts come from prompts.py; models read `Batch`. Labels come from where a sample's target starts, never from token
ids, so a tokenizer whose padding token is its end token masks nothing by accident.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


@dataclass
class Example:
    """One tokenised sentence: prompt, target, end of turn."""

    input_ids: list[int]
    target_start: int
    """input_ids[target_start:] are the target's tokens, the end of turn included."""
    group: int
    """Index into DataConfig.groups: the direction where a run has several, else the domain."""
    uid: str
    """`<domain>/<split>/<record>`, for example it/train/17; `<pair>/` before it where a run has several directions."""


@dataclass
class Batch:
    """What one forward takes. `rows` is 1 when packed; `L` is the number of target tokens."""

    input_ids: Tensor
    """int64 [rows, width]."""
    position_ids: Tensor | None
    """int64 [rows, width], restarting with every sample, when packed; None when padded (on the right)."""
    segments: Tensor
    """int32 [samples, 2]: half-open range of each sample's tokens in the flattened [rows * width]."""
    target_segments: Tensor
    """int32 [samples, 2]: half-open range of the flattened positions that predict the sample's target tokens."""
    predict: Tensor
    """int64 [L]: flattened positions whose logits are needed, sample by sample."""
    target: Tensor
    """int64 [L]: the token that each of them must predict."""
    target_sample: Tensor
    """int64 [L]: the sample that each belongs to."""
    groups: Tensor
    """int64 [samples]."""
    uids: list[str]
    weight: Tensor
    """float32 [samples]: 1, or 0 for a sentence that only fills a rank's share."""
    ranges: list[tuple[int, int]]
    """`segments` on the host, so that nobody has to ask the device …"""
    target_ranges: list[tuple[int, int]]
    """… and `target_segments`."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`; the host does not wait for a GPU."""
        device = torch.device(device)

        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)

        return Batch(**{field.name: moved(getattr(self, field.name)) for field in dataclasses.fields(self)})


def pack(examples: Sequence[Example], weights: Sequence[float] | None = None) -> Batch:
    """One row [1, total tokens] without padding; position_ids restart with every sample."""
    lengths = [len(example.input_ids) for example in examples]
    starts = list(accumulate(lengths, initial=0))[:-1]
    ids = torch.tensor([[token for example in examples for token in example.input_ids]])
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return _batch(examples, starts, ids, positions, weights)


def pad(examples: Sequence[Example], pad_id: int, weights: Sequence[float] | None = None) -> Batch:
    """One row a sample [samples, longest], padded on the right with `pad_id`."""
    width = max(len(example.input_ids) for example in examples)
    ids = torch.full((len(examples), width), pad_id)
    for row, example in enumerate(examples):
        ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
    return _batch(examples, [row * width for row in range(len(examples))], ids, None, weights)


def _batch(
    examples: Sequence[Example],
    starts: Sequence[int],
    ids: Tensor,
    positions: Tensor | None,
    weights: Sequence[float] | None,
) -> Batch:
    """Index the targets of samples whose tokens begin at `starts` in the flattened `ids`."""
    assert all(0 < e.target_start < len(e.input_ids) for e in examples), "a sample without a token to predict"
    assert weights is None or len(weights) == len(examples)
    placed = list(zip(starts, examples, strict=True))
    segments = [(at, at + len(e.input_ids)) for at, e in placed]
    predicting = [(at + e.target_start - 1, at + len(e.input_ids) - 1) for at, e in placed]
    predict = torch.cat([torch.arange(first, last) for first, last in predicting])
    counts = torch.tensor([last - first for first, last in predicting])
    return Batch(
        input_ids=ids,
        position_ids=positions,
        segments=torch.tensor(segments, dtype=torch.int32),
        target_segments=torch.tensor(predicting, dtype=torch.int32),
        predict=predict,
        target=ids.flatten()[predict + 1],
        target_sample=torch.repeat_interleave(torch.arange(len(examples)), counts),
        groups=torch.tensor([e.group for e in examples]),
        uids=[e.uid for e in examples],
        weight=torch.ones(len(examples)) if weights is None else torch.tensor(weights, dtype=torch.float32),
        ranges=segments,
        target_ranges=predicting,
    )


def batches_by_tokens(examples: Sequence[Example], tokens_per_batch: int, packed: bool) -> Iterator[list[int]]:
    """Indices of batches of at most `tokens_per_batch` tokens (padding counted when not `packed`), for scoring and dev.

    Sentences are sorted by length, ties by index, longest first (a batch that does not fit in memory is the first);
    every sentence comes once. A sentence longer than the budget is a batch of its own.
    """
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i].input_ids), i))
    batch: list[int] = []
    used = 0
    for i in order:
        length = len(examples[i].input_ids)
        width = len(examples[batch[0]].input_ids) if batch else length
        cost = used + length if packed else (len(batch) + 1) * width
        if batch and cost > tokens_per_batch:
            yield batch
            batch, used = [], 0
        batch.append(i)
        used += length
    if batch:
        yield batch
