"""CANEFT's selection: statistics of scores → importance, mutual information, the chosen neurons.

    stats = Statistics.load("statistics.safetensors")
    selection = select(stats, Caneft(neuron_ratio=0.01))
    selection.neurons.save("neurons.safetensors")

Flat order of neurons, in every tensor here: by layer, then projection in the shape's order, then index; it breaks ties.
Counts of 1,048,576 neurons × 4 domains are merged and ranked in seconds: one pass over them, in chunks of neurons.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import one_hot

from ..kernels.histogram import BINS, HIGHEST, LOWEST, OCTAVES
from .errors import UserError
from .methods.caneft import Caneft
from .neurons import NeuronSet
from .statistics import Statistics

CHUNK = 1024  # neurons merged at once: the counts and running sums of four domains take 8 MB
WARN_CLAMPED = 0.001


@dataclass
class Selection:
    """Which neurons, and why: what a report plots and a log prints."""

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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes importance and mi as safetensors, numbers as its metadata; the neurons have a file of their own."""
        tensors = {name: each for name, each in vars(self).items() if isinstance(each, Tensor)}
        numbers = {name: each for name, each in vars(self).items() if name not in ("neurons", "importance", "mi")}
        save_file(tensors, path, {"selection": json.dumps(numbers)})


def select(stats: Statistics, method: Caneft) -> Selection:
    """Chooses the neurons of Eq. 10: the top `neuron_ratio` by consensus among the task-relevant ones.

    Raises UserError for statistics or ratios that leave nothing to choose by.
    """
    _check(stats, method)
    each = importance(stats)
    mean = each.mean(0)
    if mean.max() == mean.min():
        raise UserError(f"every neuron has the same importance ({mean[0]:.3g}): check the weights and the loss")
    mi = mutual_information(stats, method) if method.consensus else None
    if mi is not None and mi.max() <= 0:
        raise UserError(
            "mutual information is 0 for every neuron: its scores fall in one bin or are alike in all domains "
            f"({stats.clamped_share:.1%} are out of range); look at --data.seen and --score.lowest-octave"
        )
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


def importance(stats: Statistics) -> Tensor:
    """Mean score of each neuron in each domain (Eq. 8), float64 [groups, N] in flat order."""
    total = torch.cat([stats.total[projection] for projection in stats.widths], dim=-1)
    return (total / stats.samples[:, None, None]).flatten(1).cpu()


def mutual_information(stats: Statistics, method: Caneft) -> Tensor:
    """Eq. 9–10's consensus of every neuron in nats, float64 [N] in flat order."""
    samples = stats.samples.cpu()
    parts = []
    with _one_thread():
        for layer in range(stats.layers):
            for projection, counts in stats.histogram.items():
                for chunk in counts[:, layer].split(CHUNK, dim=1):
                    merged = merge_bins(chunk, method, stats.lowest_octave)
                    if not torch.equal(merged.sum(-1).cpu(), samples[:, None].expand(-1, merged.shape[1])):
                        raise UserError(f"layer {layer} {projection}: not every sentence was counted; score again")
                    parts.append(consensus(merged, method).cpu())
    return torch.cat(parts)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Threads would meet after each operation on a chunk: 2 s with one, 12 to 90 s with two on two busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def merge_bins(counts: Tensor, method: Caneft, lowest_octave: int) -> Tensor:
    """Merges fine histogram bins into the bins of Eq. 9: int32 [groups, n, 256] → int64 [groups, n, bins].

    quantile: fine bin b goes to bin floor(bins · (n_below + n_b/2) / N), of all domains together; in integers, exact.
    equal_width: by the fine bin's midpoint, between those of the lowest and the highest fine bin in use; fine bin 0
    (zero, and what was clamped) stands for 0. Coarser than quantile, since a fine bin is 6 to 12 % of its score wide:
    on 2,000 lognormal samples 88 % of the chosen 1 % were those of exact bins.
    Fine bins stay in order, so a bin is a difference of running sums: no pass over the counts but the one that sums.
    """
    running = counts.cumsum(-1, dtype=torch.int32)
    pooled = running.sum(0, dtype=torch.int32)
    step = torch.arange(1, method.bins, device=counts.device)
    if method.binning == "quantile":
        twice_middle = pooled.clone()
        twice_middle[:, 1:] += pooled[:, :-1]
        least = -(-2 * pooled[:, -1:].to(torch.int64) * step // method.bins)  # ⌈2Nk/bins⌉
        edge = torch.searchsorted(twice_middle, least.to(torch.int32))
    else:
        middle = _midpoints(lowest_octave).to(counts.device)
        low = middle[(pooled == 0).sum(-1, keepdim=True)]
        high = middle[(pooled < pooled[:, -1:]).sum(-1, keepdim=True)]
        edge = torch.searchsorted(middle, low + (high - low) * step / method.bins)
    below = running.gather(-1, (edge - 1).clamp_min(0).expand(len(counts), -1, -1))
    below = below.masked_fill_((edge == 0).expand_as(below), 0).to(torch.int64)
    ends = running.new_zeros(*running.shape[:2], 1), running[..., -1:]
    return torch.cat([ends[0], below, ends[1]], -1).diff(dim=-1)


def consensus(counts: Tensor, method: Caneft) -> Tensor:
    """Eq. 10 for one reading of it: counts int64 [groups, n, bins] → float64 [n], nats.

    specific: min over d of I(d) = Σ_b p(b|d) ln(p(b|d)/p(b)); one_vs_rest: min over d of I(B; [D=d]);
    joint: I(B; D) = Σ_d p(d) I(d), Eq. 9. Rounded to 2^-40 nats, so that values equal but for the order of their
    sums tie, on every device.
    """
    counts = counts.to(torch.float64)
    pooled = counts.sum(0, keepdim=True)
    each, total = counts.sum(-1), pooled.sum(-1)
    if method.consensus == "one_vs_rest":
        rest = divergence(pooled - counts, pooled) * (total - each)
        value = ((divergence(counts, pooled) * each + rest) / total).amin(0)
    elif method.consensus == "joint":
        value = (divergence(counts, pooled) * each / total).sum(0)
    else:
        value = divergence(counts, pooled).amin(0)
    return torch.ldexp(torch.ldexp(value, torch.tensor(40)).round(), torch.tensor(-40))


def divergence(counts: Tensor, pooled: Tensor) -> Tensor:
    """Σ_b p(b) ln(p(b)/q(b)), p from counts [groups, n, bins], q from pooled [1, n, bins], float64 → [groups, n]."""
    each, total = counts.sum(-1, keepdim=True), pooled.sum(-1, keepdim=True)
    ratio = (counts * total).div_(each * pooled)  # products of integers, exact: equal shares give exactly 1
    return ratio.masked_fill_(counts == 0, 1.0).log_().mul_(counts).sum(-1) / each.squeeze(-1)


def task_relevant(each: Tensor, method: Caneft) -> Tensor:
    """MDMTN: bool [N], the top `task_ratio` of importance [groups, N]; all where the filter is off."""
    if method.task_ratio is None:
        return torch.ones(each.shape[1], dtype=torch.bool)
    keep = max(1, share_of(method.task_ratio, each.shape[1]))
    rows = each.mean(0, keepdim=True) if method.task_merge == "mean" else each
    top = torch.zeros(rows.shape, dtype=torch.bool)
    top.scatter_(1, rows.argsort(dim=1, descending=True, stable=True)[:, :keep], True)
    return top.any(0) if method.task_merge == "union" else top.all(0)


def share_of(ratio: float, total: int) -> int:
    """ratio · total, halves rounded up, of the decimal number as it was written: 0.145 of 100 is 15."""
    return int((Decimal(repr(float(ratio))) * total).to_integral_value(ROUND_HALF_UP))


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


def _midpoints(lowest_octave: int) -> Tensor:
    """Arithmetic midpoint of every fine bin, float64 [256]; 0 for bin 0."""
    bin = torch.arange(BINS)
    middle = torch.ldexp(1 + (bin % 8 + 0.5).to(torch.float64) / 8, bin // 8 + lowest_octave)
    return middle.masked_fill(bin == 0, 0.0)


def agreement(exact_scores: Tensor, groups: Tensor, stats: Statistics, method: Caneft | None = None) -> dict[str, Any]:
    """How close the streamed histogram comes to binning the scores themselves: measured.

    exact_scores: float32 [samples, N] in flat order, of the same sentences as `stats`; groups: int64 [samples].
    Returns mean_abs_delta and max_abs_delta of the MI in nats, overlap of the selected share, and the sizes.
    """
    method = method or Caneft()
    assert method.consensus
    assert exact_scores.shape == (int(stats.samples.sum()), stats.neurons)
    step = max(1, (1 << 22) // len(groups))
    merged = [exact_bins(part.T.contiguous(), groups, method) for part in exact_scores.split(step, dim=1)]
    exact = torch.cat([consensus(counts, method) for counts in merged])
    member = one_hot(groups, len(stats.groups)).T.to(torch.float64)
    mean = torch.cat([member @ part.to(torch.float64) for part in exact_scores.split(step, dim=1)], 1)
    mean /= member.sum(1, keepdim=True)
    streamed = mutual_information(stats, method)
    ours = _top(streamed, task_relevant(importance(stats), method), method)
    theirs = _top(exact, task_relevant(mean, method), method)
    delta = (exact - streamed).abs()
    return {
        "mean_abs_delta": float(delta.mean()),
        "max_abs_delta": float(delta.max()),
        "overlap": int(torch.isin(ours, theirs).sum()) / len(ours),
        "selected": len(ours),
        "samples": len(groups),
        "neurons": stats.neurons,
    }


def exact_bins(scores: Tensor, groups: Tensor, method: Caneft) -> Tensor:
    """Bins of Eq. 9 from scores [n, samples] themselves, by rank (equal scores share a bin) or by equal width.

    groups: int64 [samples]. Returns counts int64 [groups, n, bins].
    """
    if method.binning == "quantile":
        order = scores.sort(dim=1).values
        below, up_to = torch.searchsorted(order, scores), torch.searchsorted(order, scores, right=True)
        place = method.bins * (below + up_to) // (2 * scores.shape[1])
    else:
        low, high = scores.amin(1, keepdim=True).double(), scores.amax(1, keepdim=True).double()
        place = (method.bins * (scores - low) / (high - low)).nan_to_num(0.0).long()
    place = place.clamp_max(method.bins - 1)
    counts = torch.zeros(int(groups.max()) + 1, len(scores), method.bins, dtype=torch.int64)
    for group in range(len(counts)):
        own = place[:, groups == group]
        counts[group].scatter_add_(1, own, torch.ones_like(own))
    return counts
