"""A check of theory: do scores say what a channel's silence costs?

    slicetune ask silence runs/caneft --channels 60 --sentences 48

A score is a first-order guess of how a sentence's loss changes when the channel's output is 0 at all its positions:
|Σ_t A·G| (`abs_sum`) is that guess, the mean over t of |A·G| (`mean_abs`, Eq. 8) what the paper ranks by. Here
channels are silenced one at a time, and the loss is measured. A silent gate (act(0) = 0) and a silent `up` both stop
the unit, so the truth of the two is the same; their scores are not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...kernels.common.fold import Segments
from ..common import distributed
from ..common.errors import UserError
from ..data.batching import Batch
from ..data.draws import shuffled
from ..evaluation.report.answer import Figure, Table, write
from ..evaluation.report.charts import scatter
from ..models.sites import find_ffns
from ..scoring.loss import sample_means, target_losses
from ..scoring.passes import ScoreTap
from ..slices.ffn import fuse
from .paired import batches_of, losses
from .source import Source

REDUCTIONS = ("mean_abs", "abs_sum")


@dataclass
class Arguments:
    """Scores against the true change of the loss when a channel is silenced."""

    run: str
    """Any run: its base model, data and prompt are taken."""
    channels: int = 60
    """Of each projection, drawn over all layers; gate and up are of the same units."""
    sentences: int = 12
    """A domain, of the dev split."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("channels", 3), ("sentences", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least {least}")


Channel = tuple[int, str, int]
"""Layer, projection, index."""


def draw(layers: int, widths: dict[str, int], count: int, seed: int) -> list[Channel]:
    """`count` channels of each projection over all layers; projections of one width (gate, up): the same units."""
    channels = []
    for name, width in widths.items():
        drawn = sorted(shuffled(range(layers * width), "channels", seed, width)[:count])
        channels += [(place // width, name, place % width) for place in drawn]
    return channels


@contextlib.contextmanager
def silenced(model: nn.Module, channel: Channel) -> Iterator[None]:
    """Inside, that output channel of that projection (bias included) is 0 at every position."""
    layer, role, index = channel
    site = find_ffns(model)[layer]

    def silence(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        output = output.clone()
        output[..., index] = 0
        return output

    handle = getattr(site.module, site.projections[role]).register_forward_hook(silence)
    try:
        yield
    finally:
        handle.remove()


def true_changes(model: nn.Module, batches: Sequence[Batch], channels: Sequence[Channel]) -> Tensor:
    """Loss when silenced minus loss, float64 [channels, sentences]. A collective: ranks share the channels.

    A unit's gate and up are measured once: the silence of either stops it.
    """
    before = losses(model, batches)
    stops = [(layer, "up" if role == "gate" else role, index) for layer, role, index in channels]
    once = list(dict.fromkeys(stops))
    mine = []
    for channel in once[distributed.rank() :: distributed.world()]:
        with silenced(model, channel):
            mine.append((channel, losses(model, batches) - before))
    changes = dict(pair for part in distributed.collect(mine) for pair in part)
    return torch.stack([changes[stop] for stop in stops])


class Recorder(ScoreTap):
    """A tap that keeps every sample's scores of some channels instead of counting those of all."""

    def __init__(self, channels: Sequence[Channel], reduce: str) -> None:
        self.channels, self.reduce, self.anchor = channels, reduce, torch.zeros((), requires_grad=True)
        self.kept: dict[Channel, list[Tensor]] = {channel: [] for channel in channels}

    def begin(self, batch: Batch) -> None:
        self.segments = Segments(batch.ranges, batch.groups.device)
        self.lengths = self.segments.lengths()

    def record(self, layer: int, scores: dict[str, Tensor], *units: Tensor) -> None:
        for channel in self.channels:
            if channel[0] == layer:
                total = scores[channel[1]][:, channel[2]]
                score = total / self.lengths if self.reduce == "mean_abs" else total.abs()
                self.kept[channel].append(score.detach().cpu())


def scores(model: nn.Module, batches: Sequence[Batch], channels: Sequence[Channel], reduce: str) -> Tensor:
    """The engine's scores under one token reduction, float64 [channels, sentences]; fuses the model's FFNs."""
    model.requires_grad_(False)
    recorder = Recorder(channels, reduce)
    fused = fuse(model)
    for ffn in fused:
        ffn.tap = recorder
    for batch in batches:
        recorder.begin(batch)
        sample_means(target_losses(model, batch), batch).sum().backward()
    for ffn in fused:
        ffn.tap = None
    return torch.stack([torch.cat(recorder.kept[channel]).double() for channel in channels])


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two lists; NaN where one of them is all alike."""
    from scipy.stats import spearmanr

    if a.unique().numel() < 2 or b.unique().numel() < 2:
        return float("nan")
    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def within(score: Tensor, change: Tensor) -> float:
    """Median over sentences of the rank correlation over channels; both [channels, sentences]."""
    each = [spearman(score[:, s], change[:, s]) for s in range(score.shape[1])]
    return float(torch.tensor(each, dtype=torch.float64).nanmedian())


def correlations(
    channels: Sequence[Channel], score: dict[str, Tensor], change: Tensor
) -> list[list[str | int | float]]:
    """Rows (projection, channels, then for each reduction: over channels, within sentences, with the mean change).

    score: [channels, sentences] by reduction; change: the same, signed. "Over channels" ranks the mean score against
    the mean |change|, "with the mean change" against the |mean change|.
    """
    rows = []
    for name in [*dict.fromkeys(projection for _, projection, _ in channels), "all"]:
        mine = torch.tensor([i for i, c in enumerate(channels) if name in (c[1], "all")])
        truth, row = change[mine], [name, len(mine)]
        for reduction in REDUCTIONS:
            guess = score[reduction][mine]
            row.append(spearman(guess.mean(1), truth.abs().mean(1)))
            row.append(within(guess, truth.abs()))
            row.append(spearman(guess.mean(1), truth.mean(1).abs()))
        rows.append(row)
    return rows


def answer(given: Arguments) -> None:
    """Writes silence.html and its tables."""
    distributed.start()
    source = Source(given.run)
    shape = source.shape
    channels = draw(shape.layers, shape.widths, given.channels, given.seed)
    batches = batches_of(source, source.examples("dev", given.sentences))
    model = source.model()
    change = true_changes(model, batches, channels)
    score = {reduction: scores(model, batches, channels, reduction) for reduction in REDUCTIONS}
    distributed.first(lambda: report(given.run, channels, score, change))
    distributed.stop()


def report(run: str, channels: Sequence[Channel], score: dict[str, Tensor], change: Tensor) -> None:
    """Correlations, every channel's numbers, and pictures."""
    columns = ["projection", "channels"]
    for reduction in REDUCTIONS:
        columns += [f"{reduction}: over channels", "within sentences", "with the mean change"]
    rows = correlations(channels, score, change)
    true = torch.stack([change.abs().mean(1), change.mean(1)], 1).tolist()
    guess = torch.stack([score[reduction].mean(1) for reduction in REDUCTIONS], 1).tolist()
    each = [[*channel, *guess[i], *true[i]] for i, channel in enumerate(channels)]
    head = ["layer", "projection", "index", *REDUCTIONS, "mean |change|", "mean change"]
    tables = [Table("correlation", columns, rows, "Spearman's rank correlation of score and true change", 3)]
    figures = []
    for reduction in REDUCTIONS:
        points: dict[str, list[tuple[float, float]]] = {}
        for row in each:
            points.setdefault(row[1], []).append((row[head.index(reduction)], row[-2]))
        figures.append(Figure(f"By {reduction}", scatter(points, f"mean {reduction}", "mean |change of the loss|")))
    words = (
        f"{len(channels)} channels, each silenced for {change.shape[1]} sentences. A correlation of 1 is the same "
        "order; nats of a sentence's mean loss. The CSV has every channel."
    )
    tables.append(Table("channels", head, each, shown=False))
    write(run, "silence", "Scores and what silence costs", words, tables, figures)
