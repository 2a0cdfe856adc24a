"""The scoring pass: per-sample |activation × gradient| of every channel, streamed into per-group statistics.

CANEFT Eq. 1–3 and 8. Scores fall out of the FFN's backward (fused.py, kernels/): no weight gradient is computed, no
per-sample tensor is kept, and memory does not grow with the number of samples. Packed samples do not interact, so
each gets the score that it gets alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.common.fold import Segments
from ...kernels.histogram import BINS
from ..common.errors import UserError
from ..data.batching import Batch, Example, batches_by_tokens, pack, pad
from ..models.large.partition import gathering, is_partitioned, same_sums
from ..models.packing import packs_long_rows
from ..models.shapes import ModelShape
from ..slices.ffn import fuse
from ..slices.fused import Tap
from .config import ScoreConfig
from .loss import sample_means, target_losses
from .share import Share, owned
from .statistics import Statistics


class ScoreTap:
    """Hangs in every FFN during the scoring pass; turns per-sample sums into scores and adds them to `statistics`.

    Those are a Statistics, or what takes the same (window.py).
    """

    def __init__(self, statistics: Statistics | Any, config: ScoreConfig) -> None:
        self.statistics, self.reduce, self.tokens = statistics, config.token_reduce, config.tokens
        self.anchor = torch.zeros((), requires_grad=True)
        self.segments: Segments
        self.lengths: Tensor
        self.groups: Tensor
        self.recorded = True

    def begin(self, batch: Batch, recorded: bool = True) -> None:
        """Take the next batch: which rows count, for which sample, of which group; a filler is not recorded."""
        self.recorded = recorded
        ranges = batch.ranges if self.tokens == "all" else batch.target_ranges
        self.segments, self.groups = Segments(ranges, batch.groups.device), batch.groups.to(torch.int32)
        self.lengths = self.segments.lengths()
        if recorded:
            self.statistics.add_samples(batch.groups, self.lengths.to(torch.int64))

    def record(self, layer: int, scores: dict[str, Tensor], unit: Tensor, active: Tensor, activation: Tensor) -> None:
        """Per-sample sums [samples, width] of one layer: called once a batch, in the layer's backward."""
        if not self.recorded:
            return
        for projection, sums in scores.items():
            self.statistics.add_sums(layer, projection, sums, self.lengths, self.groups, self.reduce)
        self.statistics.add_units(layer, active, activation, self.lengths, self.groups)


def batch_of(examples: Sequence[Example], packed: bool, pad_id: int) -> Batch:
    return pack(examples) if packed else pad(examples, pad_id)


def score(
    model: nn.Module,
    examples: Sequence[Example],
    statistics: Statistics,
    config: ScoreConfig,
    *,
    pad_id: int = 0,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int], None] = lambda samples: None,
    done: int = 0,
    after_batch: Callable[[int], None] = lambda done: None,
) -> None:
    """Score `examples` on `model`, which is frozen for it, and add them to `statistics`, all-reduced at the end.

    Every rank takes every world-th batch of one deterministic list, so batches, and with them the scores' bits, do
    not depend on the number of ranks. `statistics` is a Share on each of several ranks, or the whole on each. Its
    first `done` batches of the list are in the statistics of all ranks already. `progress` and `after_batch` are
    `walk`'s. Raises UserError when the loss is not finite.
    """
    packed, device = packs_long_rows(model), next(model.parameters()).device
    tap = ScoreTap(statistics, config)
    assert not isinstance(statistics, Share) or (statistics.rank, statistics.world) == (rank, world)

    def work(indices: list[int], recorded: bool) -> None:
        batch = batch_of([examples[i] for i in indices], packed, pad_id).to(device)
        tap.begin(batch, recorded)
        backpropagate(model, batch, config.loss)

    def exchange(turn: Sequence[list[int]]) -> None:
        if isinstance(statistics, Share):
            groups = [[examples[i].group for i in batch] for batch in turn]
            statistics.exchange(groups + [[] for _ in range(world - len(turn))])

    batches = list(batches_by_tokens(examples, config.batch_tokens, packed))
    turns = Turns(rank, world, is_partitioned(model), progress)
    with tapped(model, tap):
        walk(batches, work, turns, done=done, after_batch=after_batch, exchange=exchange)
    statistics.all_reduce()


@contextmanager
def tapped(model: nn.Module, tap: Tap) -> Iterator[None]:
    """The model frozen, every FFN fused and with `tap` in it, its blocks checkpointed where that is turned on.

    A partitioned model gives the bits that a whole one gives.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.requires_grad_(False)
    fused = fuse(model)
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and not m.training]
    sums = [] if is_partitioned(model) else same_sums(model)
    try:
        for ffn in fused:
            ffn.tap = tap
        for block in blocks:
            block.training = (
                True  # transformers checkpoints in training mode only; the block's children stay as they are
            )
        with gathering(model):
            yield
    finally:
        for hook in sums:
            hook.remove()
        for ffn in fused:
            ffn.tap = None
        for block in blocks:
            block.training = False


@dataclass(frozen=True)
class Turns:
    """How the ranks share a list of batches: each takes one a turn."""

    rank: int
    world: int
    together: bool
    """All ranks must run the model equally often: one without a batch runs the first sample, and records nothing."""
    progress: Callable[[int], None]
    """Called with the samples of a turn, of all ranks."""


def walk(
    batches: Sequence[list[int]],
    work: Callable[[list[int], bool], None],
    turns: Turns,
    *,
    done: int,
    after_batch: Callable[[int], None],
    exchange: Callable[[Sequence[list[int]]], None] = lambda turn: None,
) -> None:
    """Call `work(batch, recorded)` with every world-th batch of those after the first `done`.

    After each turn every rank calls `exchange` with the turn's batches, one a rank, fewer in the last turn; then
    `after_batch` with how many of the list are done now. That may raise.
    """
    turns.progress(sum(map(len, batches[:done])))
    for start in range(done, len(batches), turns.world):
        turn = batches[start : start + turns.world]
        if turns.rank < len(turn):
            work(turn[turns.rank], True)
        elif turns.together:
            work([0], False)
        exchange(turn)
        turns.progress(sum(map(len, turn)))
        after_batch(start + len(turn))


def backpropagate(model: nn.Module, batch: Batch, kind: str) -> None:
    """Forward and backward of the sum over samples of each one's own loss: none has a part in another's gradient.

    Raises UserError naming the sentences whose loss is not finite. That waits for the device, so it comes when the
    backward has been queued: before it the device would wait for the host as well.
    """
    losses = target_losses(model, batch)
    loss = sample_means(losses, batch).sum() if kind == "mean" else losses.sum()
    loss.backward()
    if math.isfinite(float(loss.detach())):
        return
    means = sample_means(losses.detach(), batch).tolist()
    bad = [uid for uid, mean in zip(batch.uids, means, strict=True) if not math.isfinite(mean)]
    raise UserError(f"the loss of {' '.join(bad[:5])} is not finite: look at those sentences and at the weights")


def counts_bytes(groups: int, shape: ModelShape, ranks: int = 1) -> int:
    """Of the int32 histogram counts of the rank that has most layers: 4 bytes × bins × groups × its neurons."""
    return 4 * BINS * groups * len(owned(shape.layers, 0, ranks)) * shape.neurons_per_layer


def counts_device(config: ScoreConfig, device: torch.device) -> torch.device:
    """Where a rank's histogram counts live (4.3 GB for four domains on Llama-3.1-8B, divided by the ranks).

    On `device` but for `host`: `auto` is settled before the pass, by what fits (run/forecast/settle.py).
    """
    return torch.device("cpu") if config.counts == "host" else device
