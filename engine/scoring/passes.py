"""The scoring pass: per-sample |activation × gradient| of every channel, streamed into per-group statistics.

CANEFT Eq. 1–3 and 8. Scores fall out of the FFN's backward (fused.py, kernels/): no weight gradient is computed, no
per-sample tensor is kept, and memory does not grow with the number of samples. Packed samples do not interact, so
each gets the score that it gets alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.common.fold import Segments
from ...kernels.histogram import BINS
from ..common.errors import UserError
from ..data.batching import Batch, Example, batches_by_tokens, pack, pad
from ..models.packing import packs_long_rows
from ..models.shapes import ModelShape
from ..slices.ffn import fuse
from ..slices.fused import Tap
from .config import ScoreConfig
from .loss import sample_means, target_losses
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

    def begin(self, batch: Batch) -> None:
        """Take the next batch: which rows count, for which sample, of which group."""
        ranges = batch.ranges if self.tokens == "all" else batch.target_ranges
        self.segments, self.groups = Segments(ranges, batch.groups.device), batch.groups.to(torch.int32)
        self.lengths = self.segments.lengths()
        self.statistics.add_samples(batch.groups, self.lengths.to(torch.int64))

    def record(self, layer: int, scores: dict[str, Tensor], unit: Tensor, active: Tensor, activation: Tensor) -> None:
        """Per-sample sums [samples, width] of one layer: called once a batch, in the layer's backward."""
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
    not depend on the number of ranks. `progress` is called with the number of samples of every batch. `done` batches
    of this rank are in `statistics` already; `after_batch(done)` is called equally often on every rank, so that it
    may agree on something; it may raise. Raises UserError when the loss is not finite.
    """
    packed, device = packs_long_rows(model), next(model.parameters()).device
    tap = ScoreTap(statistics, config)

    def work(indices: list[int]) -> None:
        batch = batch_of([examples[i] for i in indices], packed, pad_id).to(device)
        tap.begin(batch)
        backpropagate(model, batch, config.loss)

    batches = list(batches_by_tokens(examples, config.tokens_per_batch, packed))
    with tapped(model, tap):
        walk(batches, work, rank=rank, world=world, progress=progress, done=done, after_batch=after_batch)
    statistics.all_reduce()


@contextmanager
def tapped(model: nn.Module, tap: Tap) -> Iterator[None]:
    """The model frozen, every FFN fused and with `tap` in it, its blocks checkpointed where that is turned on."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.requires_grad_(False)
    fused = fuse(model)
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and not m.training]
    try:
        for ffn in fused:
            ffn.tap = tap
        for block in blocks:
            block.training = (
                True  # transformers checkpoints in training mode only; the block's children stay as they are
            )
        yield
    finally:
        for ffn in fused:
            ffn.tap = None
        for block in blocks:
            block.training = False


def walk(
    batches: Sequence[list[int]],
    work: Callable[[list[int]], None],
    *,
    rank: int,
    world: int,
    progress: Callable[[int], None],
    done: int,
    after_batch: Callable[[int], None],
) -> None:
    """Call `work` with every world-th batch, this rank's first `done` passed over; the callbacks are `score`'s."""
    mine = batches[rank::world]
    progress(sum(map(len, mine[:done])))
    for turn in range(-(-len(batches) // world)):
        if done <= turn < len(mine):
            work(mine[turn])
            progress(len(mine[turn]))
        after_batch(max(done, min(turn + 1, len(mine))))


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


FREE_SHARE = 0.4
"""`--score.counts auto` keeps the counts on the device where they take at most this share of its free memory."""


def counts_bytes(groups: int, shape: ModelShape, ranks: int = 1) -> int:
    """Of the int32 histogram counts of one rank: 4 bytes × bins × groups × neurons.

    Each layer's have one owner, layer l rank l % ranks: this is the rank that owns most.
    """
    return 4 * BINS * groups * math.ceil(shape.layers / ranks) * shape.neurons_per_layer


def counts_device(config: ScoreConfig, shape: ModelShape, groups: int, device: torch.device) -> torch.device:
    """Where the histogram counts (4.3 GB for four domains on Llama-3.1-8B) live."""
    if config.counts == "host" or device.type == "cpu":
        return torch.device("cpu")
    if config.counts == "device":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    return device if counts_bytes(groups, shape) <= FREE_SHARE * free else torch.device("cpu")
