"""CANEFT's selection: statistics of scores → importance, the task filter, the chosen neurons (Eq. 8 and 10).

    stats = Statistics.load("statistics.safetensors")
    selection = select(stats, neuron_ratio=0.01)
    selection.neurons.save("neurons.safetensors")

Flat order of neurons, in every tensor here: by layer, then projection in the shape's order, then index; it breaks ties.
What a score tells about the domain is computed in information.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ....kernels.histogram import OCTAVES
from ...common.errors import UserError
from ...scoring.statistics import Statistics
from ...slices.neurons import NeuronSet
from ..counts import share_of
from .information import Binning, Consensus, mutual_information

WARN_CLAMPED = 0.001
Merge = Literal["mean", "intersection", "union"]


@dataclass
class Selection:
    """Which neurons, and why."""

    neurons: NeuronSet
    importance: Tensor
    """float32 [N], mean over domains of the domain's mean score."""
    mi: Tensor | None
    """float32 [N], nats, by the chosen consensus; None where neurons are ranked by importance alone."""
    candidates: int
    """Neurons that the task filter left."""
    gamma: float
    """The least value that was chosen (Eq. 10's γ): nats, or importance where that is what ranks."""
    ties: int
    """Candidates whose value is γ exactly; flat order decided among them when there is more than one."""
    ties_left_out: int
    samples: dict[str, int]
    """Sentences by domain."""
    clamped_share: float
    warnings: list[str] = field(default_factory=list)
    """What the user should be told, a line each."""


def select(
    stats: Statistics,
    *,
    task_ratio: float | None = 0.2,
    task_merge: Merge = "mean",
    consensus: Consensus | None = "specific",
    bins: int = 10,
    binning: Binning = "quantile",
    neuron_ratio: float = 0.01,
) -> Selection:
    """Chooses the neurons of Eq. 10: the top `neuron_ratio` by consensus among the task-relevant ones.

    The options are those of settings.Caneft. Raises UserError for statistics or ratios that leave nothing to choose by.
    """
    options = {"task_ratio": task_ratio, "task_merge": task_merge, "consensus": consensus}
    options |= {"bins": bins, "binning": binning, "neuron_ratio": neuron_ratio}
    _check(stats, consensus)
    check_ratios(stats.neurons, len(stats.groups), neuron_ratio, task_ratio, task_merge)
    each = importance(stats)
    mean = each.mean(0)
    _check_importance(mean)
    mi = _information(stats, bins, binning, consensus) if consensus else None
    candidates = task_relevant(each, task_ratio, task_merge)
    value = mean if mi is None else mi
    chosen = _top(value, candidates, neuron_ratio, f"{task_ratio} (--method.task-merge {task_merge})")
    at_gamma = candidates & (value == value[chosen[-1]])
    selection = Selection(
        neurons=NeuronSet.from_flat(chosen, stats),
        importance=mean.to(torch.float32),
        mi=None if mi is None else mi.to(torch.float32),
        candidates=int(candidates.sum()),
        gamma=float(value[chosen[-1]]),
        ties=int(at_gamma.sum()),
        ties_left_out=int(at_gamma.sum() - at_gamma[chosen].sum()),
        samples=dict(zip(stats.groups, stats.samples.tolist(), strict=True)),
        clamped_share=stats.clamped_share,
    )
    selection.warnings = _warnings(stats, selection)
    selection.neurons.provenance = _provenance(stats, options, selection)
    return selection


def _check_importance(mean: Tensor) -> None:
    if mean.max() == mean.min():
        raise UserError(f"every neuron has the same importance ({mean[0]:.3g}): check the weights and the loss")


def _information(stats: Statistics, bins: int, binning: Binning, consensus: Consensus) -> Tensor:
    """Mutual information. Raises UserError where it tells nothing of any neuron."""
    mi = mutual_information(stats, bins, binning, consensus)
    if mi.max() <= 0:
        raise UserError(
            "mutual information is 0 for every neuron: its scores fall in one bin or are alike in all domains "
            f"({stats.clamped_share:.1%} are out of range); look at --data.seen and at the model"
        )
    return mi


def importance(stats: Statistics) -> Tensor:
    """Mean score of each neuron in each domain (Eq. 8), float64 [groups, N] in flat order."""
    total = torch.cat([stats.total[projection] for projection in stats.widths], dim=-1)
    return (total / stats.samples[:, None, None]).flatten(1).cpu()


def task_relevant(each: Tensor, task_ratio: float | None, task_merge: Merge) -> Tensor:
    """MDMTN: bool [N], the top `task_ratio` of importance [groups, N]; all where the filter is off."""
    if task_ratio is None:
        return torch.ones(each.shape[1], dtype=torch.bool)
    keep = _kept(task_ratio, each.shape[1])
    rows = each.mean(0, keepdim=True) if task_merge == "mean" else each
    top = torch.zeros(rows.shape, dtype=torch.bool)
    top.scatter_(1, rows.argsort(dim=1, descending=True, stable=True)[:, :keep], True)
    return top.any(0) if task_merge == "union" else top.all(0)


def _top(value: Tensor, candidates: Tensor, neuron_ratio: float, task_filter: str) -> Tensor:
    """Flat numbers of the chosen candidates, best first; `task_filter` is how an error names its settings."""
    wanted, found = share_of(neuron_ratio, len(value)), candidates.nonzero().flatten()
    if len(found) < wanted:
        raise UserError(_too_few(f"{len(found):,}", wanted, task_filter))
    return found[value[found].argsort(descending=True, stable=True)[:wanted]]


def check_ratios(neurons: int, groups: int, neuron_ratio: float, task_ratio: float | None, task_merge: Merge) -> None:
    """Raises UserError where so many of `neurons` cannot be chosen, whatever their scores are."""
    wanted = share_of(neuron_ratio, neurons)
    if not 0 < wanted < neurons:
        which, remedy = ("no neuron", "raise") if not wanted else ("all neurons", "lower")
        raise UserError(f"--method.neuron-ratio {neuron_ratio} of {neurons:,} is {which}: {remedy} it")
    if task_ratio is not None:
        most = _kept(task_ratio, neurons) * (groups if task_merge == "union" else 1)
        if most < wanted:
            raise UserError(_too_few(f"at most {most:,}", wanted, f"{task_ratio} (--method.task-merge {task_merge})"))


def _kept(task_ratio: float, neurons: int) -> int:
    """How many neurons are in the top share of importance."""
    return max(1, share_of(task_ratio, neurons))


def _too_few(left: str, wanted: int, task_filter: str) -> str:
    return (
        f"the task filter leaves {left} neurons of the {wanted:,} wanted: raise --method.task-ratio {task_filter} or "
        "lower --method.neuron-ratio"
    )


def _check(stats: Statistics, consensus: Consensus | None) -> None:
    """Refuses what cannot be chosen from, in one line."""
    empty = [name for name, samples in zip(stats.groups, stats.samples.tolist(), strict=True) if not samples]
    if empty:
        names = " ".join(map(repr, empty))
        raise UserError(f"no sentence of {names} was scored: check its files or take it out of --data.seen")
    if len(stats.groups) < 2 and consensus:
        raise UserError(
            f"only one group was scored, {stats.groups[0]!r}, and mutual information compares groups: name two domains "
            "or more in --data.seen, or two files or more in `slicetune score` (--method.consensus None needs one)"
        )
    for layer in range(stats.layers):
        for projection, total in stats.total.items():
            if not torch.isfinite(total[:, layer]).all():
                raise UserError(
                    f"layer {layer} {projection}: scores are NaN or infinite; check the weights, or score in another "
                    "--model.dtype"
                )


def _warnings(stats: Statistics, selection: Selection) -> list[str]:
    lines = []
    if len(set(selection.samples.values())) > 1:
        counts = ", ".join(f"{name!r} {samples:,}" for name, samples in selection.samples.items())
        lines.append(f"domains differ in scored sentences ({counts}); p(d) is as counted")
    if selection.clamped_share > WARN_CLAMPED:
        low = int(stats.clamped_low) > int(stats.clamped_high)
        start = stats.lowest_octave
        lines.append(
            f"{selection.clamped_share:.2%} of scores lie {'below' if low else 'above'} the histogram's range "
            f"(2^{start} to 2^{start + OCTAVES}) and count as its {'lowest' if low else 'highest'} bin"
        )
    if selection.ties_left_out:
        lines.append(f"{selection.ties_left_out:,} neurons tie with the last chosen one; order in the model decided")
    return lines


def _provenance(stats: Statistics, options: dict[str, Any], selection: Selection) -> dict[str, Any]:
    return {
        "method": "caneft",
        "options": options,
        "sentences": selection.samples,
        "candidates": selection.candidates,
        "gamma": selection.gamma,
        "ties": selection.ties,
        "clamped_share": selection.clamped_share,
        "statistics": stats.provenance,
    }
