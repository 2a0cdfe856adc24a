"""Two models on the same sentences: each one's cross-entropy, and whether their difference is more than chance.

    a, b = (sentence_losses(model, dev, pad_id) for model in (one, other))
    paired(a, b)          # mean of a - b, its 95 % interval, p

Pairing takes out what makes sentences differ in difficulty, which is far more than what models differ by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..common import distributed
from ..data.batching import Batch, Example, batches_by_tokens, pad
from ..models.packing import packs_long_rows
from ..scoring.loss import sample_means, target_losses
from ..training.updates import Batcher
from .source import Source

TOKENS = 4096
"""Padded tokens of a batch."""


@dataclass(frozen=True)
class Paired:
    """A mean difference, its confidence interval, and the p of a two-sided t-test that it is 0."""

    difference: float
    low: float
    high: float
    p: float
    count: int


def paired(a: Tensor, b: Tensor, level: float = 0.95) -> Paired:
    """Student's interval of the mean of a - b, both [count] over the same sentences (or seeds).

    Differences that are all alike have no spread: then the interval is the difference itself, and p is 0, or 1 where
    it is 0. A single one has no interval: NaN.
    """
    from scipy.stats import t

    each = (a - b).double()
    count, mean = len(each), float(each.mean())
    if count < 2:
        return Paired(mean, math.nan, math.nan, math.nan, count)
    error = float(each.std()) / math.sqrt(count)
    if error == 0.0:
        return Paired(mean, mean, mean, float(mean == 0.0), count)
    room = float(t.ppf(0.5 + level / 2, count - 1)) * error
    return Paired(mean, mean - room, mean + room, 2 * float(t.sf(abs(mean) / error, count - 1)), count)


def holm(p: Sequence[float]) -> list[float]:
    """p of several tests, adjusted so that the chance of one false alarm among them all stays (Holm 1979).

    Of k tests the smallest p counts k times, the next k - 1 times, and none less than the one before it.
    """
    order = sorted(range(len(p)), key=p.__getitem__)
    adjusted, least = [0.0] * len(p), 0.0
    for place, i in enumerate(order):
        least = max(least, min(1.0, (len(p) - place) * p[i]))
        adjusted[i] = least
    return adjusted


def sentence_losses(
    model: nn.Module, sentences: Sequence[Example], pad_id: int, tokens_per_batch: int = 4096
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of each sentence's target tokens, nats a token, and their number: float64 and int64 [count].

    A collective: ranks share the batches; all get the whole.
    """
    rank, world = distributed.rank(), distributed.world()
    batcher = Batcher(packs_long_rows(model), pad_id)
    batches = list(batches_by_tokens(sentences, tokens_per_batch, batcher.packed))
    mine: list[tuple[int, float]] = []
    with torch.no_grad():
        for indices in batches[rank::world]:
            batch = batcher([sentences[i] for i in indices])
            means = sample_means(target_losses(model, batch).double(), batch)
            mine += zip(indices, means.tolist(), strict=True)
    losses = torch.empty(len(sentences), dtype=torch.float64)
    for i, loss in (pair for part in distributed.collect(mine) for pair in part):
        losses[i] = loss
    return losses, torch.tensor([len(s.input_ids) - s.target_start for s in sentences])


def losses(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Mean loss of each sentence's target tokens, float64 [sentences] in the batches' order."""
    with torch.no_grad():
        return torch.cat([sample_means(target_losses(model, batch).double(), batch) for batch in batches]).cpu()


def batches_of(source: Source, sentences: Sequence[Example]) -> list[Batch]:
    """Padded batches, so that any attention does no needless work."""
    pad_id = source.tokenizer.pad_token_id
    indices = batches_by_tokens(sentences, TOKENS, packed=False)
    return [pad([sentences[i] for i in batch], pad_id).to(distributed.device()) for batch in indices]
