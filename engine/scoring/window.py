"""Which 32 octaves the histograms of a scoring pass cover: those of the scores of its first batches.

Scores of two models can lie 2^20 apart, and a histogram has one range. A few batches, spread over the sentences'
lengths (a short sentence has the larger gradients), are scored before the pass for that. They are the same ones
whatever the number of ranks, so the window is too, and the whole statistics with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...kernels.histogram import HIGHEST, LOWEST, OCTAVES
from ..common import distributed
from ..data.batching import Example, batches_by_tokens
from ..models.packing import packs_long_rows
from .config import ScoreConfig
from .passes import ScoreTap, backpropagate, batch_of, tapped

MOST = 4
"""Batches that are looked at, and at most an eighth of all, or one."""
USUAL = -40
"""The lowest octave where no score is above zero."""


class Octaves:
    """Stands in a ScoreTap for the statistics, and counts scores by their octave: int64 [256], that of 2^(i - 127)."""

    def __init__(self) -> None:
        self.counts = torch.zeros(256, dtype=torch.int64)

    def add_samples(self, groups: Tensor, tokens: Tensor) -> None: ...

    def add_units(self, *of_a_layer: object) -> None: ...

    def add_sums(
        self, layer: int, projection: str, sums: Tensor, lengths: Tensor, groups: Tensor, reduce: str = "mean_abs"
    ) -> None:
        scores = sums / lengths[:, None] if reduce == "mean_abs" else sums.abs()
        exponents = (scores.contiguous().view(torch.int32) >> 23) & 255
        self.counts += torch.bincount(exponents.flatten(), minlength=256).cpu()


def choose(model: nn.Module, examples: Sequence[Example], config: ScoreConfig, pad_id: int = 0) -> int:
    """The lowest octave for a pass over `examples` on `model`, the same on every rank (a collective).

    Raises UserError when the loss is not finite.
    """
    packed, device = packs_long_rows(model), next(model.parameters()).device
    tap = ScoreTap(found := Octaves(), config)
    with tapped(model, tap):
        for indices in spread(list(batches_by_tokens(examples, config.batch_tokens, packed))):
            batch = batch_of([examples[i] for i in indices], packed, pad_id).to(device)
            tap.begin(batch)
            backpropagate(model, batch, config.loss)
    return distributed.share_object(window(found.counts))


def spread(batches: Sequence[list[int]]) -> list[list[int]]:
    """A few of the batches, at even distances."""
    count = min(MOST, max(1, len(batches) // 8))
    return [batches[(2 * i + 1) * len(batches) // (2 * count)] for i in range(count if batches else 0)]


def window(counts: Tensor) -> int:
    """The lowest of the 32 octaves that hold most scores; of several such windows the middle one.

    counts: int64 [256], as Octaves has them. The middle one leaves as much room above as below.
    """
    starts = range(LOWEST, HIGHEST + 1)
    inside = torch.stack([counts[start + 127 : start + 127 + OCTAVES].sum() for start in starts])
    best = [start for start, most in zip(starts, (inside == inside.max()).tolist(), strict=True) if most]
    return best[len(best) // 2] if int(inside.max()) else USUAL
