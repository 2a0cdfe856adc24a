"""CANEFT's selection: statistics of scores → importance, the task filter, the chosen neurons (Eq. 8 and 10).

    stats = Statistics.load("statistics.safetensors")
    selection = select(stats, Caneft(neuron_ratio=0.01))
    selection.neurons.save("neurons.safetensors")

Flat order of neurons, in every tensor here: by layer, then projection in the shape's order, then index; it breaks ties.
What a score tells about the domain is computed in information.py.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ....kernels.histogram import HIGHEST, LOWEST, OCTAVES
from ...common.errors import UserError
from ...scoring.statistics import Statistics
from ...slices.neurons import NeuronSet
from ..counts import share_of
from .information import mutual_information
from .settings import Caneft

WARN_CLAMPED = 0.001


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


def select(stats: Statistics, method: Caneft) -> Selection:
    """Chooses the neurons of Eq. 10: the top `neuron_ratio` by consensus among the task-relevant ones.

    Raises UserError for statistics or ratios that leave nothing to choose by.
    """
    _check(stats, method)
    each = importance(stats)
    mean = each.mean(0)
    mi = _information(stats, method, mean)
    candidates = task_relevant(each, method)
    value = mean if mi is None else mi
    chosen = _top(value, candidates, method)
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
    selection.neurons.provenance = _provenance(stats, method, selection)
    return selection


def _information(stats: Statistics, method: Caneft, mean: Tensor) -> Tensor | None:
    """Mutual information, where it is what ranks. Raises UserError where it or the mean importance tells nothing."""
    if mean.max() == mean.min():
        raise UserError(f"every neuron has the same importance ({mean[0]:.3g}): check the weights and the loss")
    if not method.consensus:
        return None
    mi = mutual_information(stats, method)
    if mi.max() <= 0:
        raise UserError(
            "mutual information is 0 for every neuron: its scores fall in one bin or are alike in all domains "
            f"({stats.clamped_share:.1%} are out of range); look at --data.seen and --score.lowest-octave"
        )
    return mi


def importance(stats: Statistics) -> Tensor:
    """Mean score of each neuron in each domain (Eq. 8), float64 [groups, N] in flat order."""
    total = torch.cat([stats.total[projection] for projection in stats.widths], dim=-1)
    return (total / stats.samples[:, None, None]).flatten(1).cpu()


def task_relevant(each: Tensor, method: Caneft) -> Tensor:
    """MDMTN: bool [N], the top `task_ratio` of importance [groups, N]; all where the filter is off."""
    if method.task_ratio is None:
        return torch.ones(each.shape[1], dtype=torch.bool)
    keep = max(1, share_of(method.task_ratio, each.shape[1]))
    rows = each.mean(0, keepdim=True) if method.task_merge == "mean" else each
    top = torch.zeros(rows.shape, dtype=torch.bool)
    top.scatter_(1, rows.argsort(dim=1, descending=True, stable=True)[:, :keep], True)
    return top.any(0) if method.task_merge == "union" else top.all(0)


def _top(value: Tensor, candidates: Tensor, method: Caneft) -> Tensor:
    """Flat numbers of the chosen candidates, best first."""
    wanted, found = share_of(method.neuron_ratio, len(value)), candidates.nonzero().flatten()
    if len(found) < wanted:
        raise UserError(
            f"the task filter leaves {len(found):,} neurons of the {wanted:,} wanted: raise --method.task-ratio "
            f"{method.task_ratio} (--method.task-merge {method.task_merge}) or lower --method.neuron-ratio"
        )
    return found[value[found].argsort(descending=True, stable=True)[:wanted]]


def _check(stats: Statistics, method: Caneft) -> None:
    """Refuses what cannot be chosen from, in one line."""
    empty = [name for name, samples in zip(stats.groups, stats.samples.tolist(), strict=True) if not samples]
    if empty:
        raise UserError(f"no sentence of {' '.join(empty)} was scored: check its files or take it out of --data.seen")
    if len(stats.groups) < 2 and method.consensus:
        raise UserError(
            f"--data.seen (or --data.pairs) names {' '.join(stats.groups)} alone: mutual information needs two or more "
            "(--method.consensus None ranks by importance)"
        )
    wanted = share_of(method.neuron_ratio, stats.neurons)
    if not 0 < wanted < stats.neurons:
        which, remedy = ("no neuron", "raise") if not wanted else ("all neurons", "lower")
        raise UserError(f"--method.neuron-ratio {method.neuron_ratio} of {stats.neurons:,} is {which}: {remedy} it")
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
        counts = ", ".join(f"{name} {samples:,}" for name, samples in selection.samples.items())
        lines.append(f"domains differ in scored sentences ({counts}); p(d) is as counted")
    if selection.clamped_share > WARN_CLAMPED:
        low = int(stats.clamped_low) > int(stats.clamped_high)
        start = stats.lowest_octave
        better = min(max(start - 8 if low else start + 8, LOWEST), HIGHEST)
        lines.append(
            f"{selection.clamped_share:.2%} of scores lie {'below' if low else 'above'} the histogram's range "
            f"(2^{start} to 2^{start + OCTAVES}): score again with --score.lowest-octave {better}"
        )
    if selection.ties_left_out:
        lines.append(f"{selection.ties_left_out:,} neurons tie with the last chosen one; order in the model decided")
    return lines


def _provenance(stats: Statistics, method: Caneft, selection: Selection) -> dict[str, Any]:
    return {
        "method": "caneft",
        "options": asdict(method),
        "sentences": selection.samples,
        "candidates": selection.candidates,
        "gamma": selection.gamma,
        "ties": selection.ties,
        "clamped_share": selection.clamped_share,
        "statistics": stats.provenance,
    }
