"""Scores into statistics: histograms by their float bits, sums by group, what lies outside, in one pass.

    accumulate(scores, groups, counts, lowest_octave)             # counts[group, neuron, bin] += 1 for each sample
    add_scores(sums, lengths, groups, Into(…), lowest_octave)     # the same from sums over tokens, with totals
    count(codes, groups, counts)                                  # the same of bins that another rank has computed
    add_units(active, activation, lengths, groups, …)             # activity of intermediate units by group

A bin is the exponent and the three leading mantissa bits of the float32 score: 8 bins an octave, 256 bins from
2**lowest_octave on. What belongs to a neuron and a group is added by the program that owns them, sample by sample, so
no order of execution can change a result. Two numbers alone are atomic, both integers: how many scores lay outside.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .common.cases import AotCase
from .common.dispatch import jit, on_device, tl, use_triton

BINS = 256
BINS_PER_OCTAVE = 8
OCTAVES = BINS // BINS_PER_OCTAVE
# 2**-126 is the smallest normal float32; below it the three leading mantissa bits would no longer be log-spaced.
LOWEST, HIGHEST = -126, 128 - OCTAVES
_CHUNK = 1 << 20  # scores indexed at once on the CPU: 8 MB of int64 indices
# One warp a program: each sample is a dependent read-modify-write, so speed is the number of programs in flight.
BLOCK, WARPS = 32, 1


def bins(scores: Tensor, lowest_octave: int) -> Tensor:
    """Bin of each score: `(bits >> 20) - ((127 + lowest_octave) << 3)` clamped to [0, 255].

    scores: any shape, float32, not negative. Returns uint8 of the same shape. Zero, subnormal and negative scores fall
    in bin 0; infinite and NaN ones in 255. Raises ValueError when lowest_octave is not in [-126, 96].
    """
    _check_octave(lowest_octave)
    assert scores.dtype == torch.float32, scores.dtype
    bits = scores.contiguous().view(torch.int32) >> 20
    return bits.sub_((127 + lowest_octave) << 3).clamp_(0, BINS - 1).to(torch.uint8)


def edges(lowest_octave: int) -> Tensor:
    """Lower edge of each bin as float64 [256]; bin 0 also holds everything below, bin 255 everything above."""
    _check_octave(lowest_octave)
    b = torch.arange(BINS)
    mantissa = 1 + (b % BINS_PER_OCTAVE).double() / BINS_PER_OCTAVE
    return torch.ldexp(mantissa, b // BINS_PER_OCTAVE + lowest_octave)


def accumulate_reference(scores: Tensor, groups: Tensor, counts: Tensor, lowest_octave: int) -> None:
    """`accumulate` in plain torch."""
    _count_blocks(scores, groups, counts, lambda block: bins(block, lowest_octave))


def count_reference(codes: Tensor, groups: Tensor, counts: Tensor) -> None:
    """`count` in plain torch."""
    _count_blocks(codes, groups, counts, lambda block: block)


def _count_blocks(values: Tensor, groups: Tensor, counts: Tensor, to_bins: Callable[[Tensor], Tensor]) -> None:
    """One integer scatter-add a chunk of neurons, a neuron's samples side by side. values: [samples, neurons]."""
    samples, neurons = values.shape
    flat = counts.view(-1)
    one = torch.ones((), dtype=counts.dtype, device=counts.device)
    first = (groups.to(torch.int64) * (neurons * BINS))[None]
    step = max(1, _CHUNK // max(1, samples))
    for start in range(0, neurons, step):
        block = to_bins(values[:, start : start + step]).t().contiguous().to(torch.int64)
        own = torch.arange(start, start + block.shape[0], device=counts.device) * BINS
        index = block.add_(own[:, None]).add_(first).view(-1)
        flat.scatter_add_(0, index, one.expand(index.shape))


@jit(do_not_specialize=("samples", "first_bin", "stride"))
def _histogram_kernel(
    scores, lengths, groups, counts, codes, total, low, high, samples, neurons, first_bin, stride, least, most,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # A thread reads and writes the same neurons in every iteration, so its own program order keeps them apart.
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = tl.program_id(1)
    mask = n < neurons
    row = (group.to(tl.int64) * neurons + n) * 256
    at = n.to(tl.int64)
    sum = tl.zeros((BLOCK,), tl.float64)
    below = tl.zeros((BLOCK,), tl.int32)
    above = tl.zeros((BLOCK,), tl.int32)
    for s in range(samples):
        if tl.load(groups + s) == group:
            score = tl.load(scores + at, mask=mask, other=0.0)
            if lengths is not None:
                score = tl.div_rn(score, tl.load(lengths + s))
            if total is not None:
                score = tl.abs(score)
            code = (score.to(tl.int32, bitcast=True) >> 20) - first_bin
            code = tl.minimum(tl.maximum(code, 0), 255)
            if counts is not None:
                cell = counts + row + code
                tl.store(cell, tl.load(cell, mask=mask, other=0) + 1, mask=mask)
            if codes is not None:
                tl.store(codes + at, code.to(tl.uint8), mask=mask)
            if total is not None:
                sum += score.to(tl.float64)
                below += ((score > 0) & (score < least)).to(tl.int32)
                above += (score >= most).to(tl.int32)
        at += neurons
    if total is not None:
        into = total + group.to(tl.int64) * stride + n
        tl.store(into, tl.load(into, mask=mask, other=0.0) + sum, mask=mask)
        few, many = tl.sum(below, 0), tl.sum(above, 0)
        if few > 0:
            tl.atomic_add(low, few.to(tl.int64))
        if many > 0:
            tl.atomic_add(high, many.to(tl.int64))


@jit(do_not_specialize=("samples",))
def _count_kernel(codes, groups, counts, samples, neurons, BLOCK: tl.constexpr):
    # As above: one program owns its neurons' counts of one group, and a thread always the same of them.
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = tl.program_id(1)
    mask = n < neurons
    row = (group.to(tl.int64) * neurons + n) * 256
    at = n.to(tl.int64)
    for s in range(samples):
        if tl.load(groups + s) == group:
            cell = counts + row + tl.load(codes + at, mask=mask, other=0).to(tl.int32)
            tl.store(cell, tl.load(cell, mask=mask, other=0) + 1, mask=mask)
        at += neurons


@jit(do_not_specialize=("samples", "stride"))
def _units_kernel(active, activation, lengths, groups, counts, total, samples, units, stride, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = tl.program_id(1)
    mask = n < units
    at = n.to(tl.int64)
    tokens = tl.zeros((BLOCK,), tl.int64)
    sum = tl.zeros((BLOCK,), tl.float64)
    for s in range(samples):
        if tl.load(groups + s) == group:
            tokens += tl.load(active + at, mask=mask, other=0)
            mean = tl.div_rn(tl.load(activation + at, mask=mask, other=0.0), tl.load(lengths + s))
            sum += mean.to(tl.float64)
        at += units
    row = group.to(tl.int64) * stride + n
    tl.store(counts + row, tl.load(counts + row, mask=mask, other=0) + tokens, mask=mask)
    tl.store(total + row, tl.load(total + row, mask=mask, other=0.0) + sum, mask=mask)


def accumulate(scores: Tensor, groups: Tensor, counts: Tensor, lowest_octave: int) -> None:
    """Count every sample's score of every neuron, in place: counts[groups[s], n, bin(scores[s, n])] += 1.

    scores: float32 [samples, neurons]. groups: integer [samples], each in [0, counts.shape[0]). counts: contiguous
    int32 [groups, neurons, 256]. Raises ValueError when lowest_octave is not in [-126, 96].
    """
    _check(scores, groups, counts, torch.float32)
    _check_octave(lowest_octave)
    if scores.numel() == 0:
        return
    if not use_triton(scores):
        accumulate_reference(scores, groups, counts, lowest_octave)
        return
    _launch(scores, None, groups, counts, None, None, lowest_octave)


def count(codes: Tensor, groups: Tensor, counts: Tensor) -> None:
    """Count every sample's bin of every neuron, in place: counts[groups[s], n, codes[s, n]] += 1.

    codes: uint8 [samples, neurons], as `bins` and `add_scores` give them. groups: integer [samples], each in
    [0, counts.shape[0]). counts: contiguous int32 [groups, neurons, 256]. All on one device.
    """
    _check(codes, groups, counts, torch.uint8)
    if codes.numel() == 0:
        return
    if not use_triton(codes):
        count_reference(codes, groups, counts)
        return
    samples, neurons = codes.shape
    with on_device(codes):
        _count_kernel[(-(-neurons // BLOCK), counts.shape[0])](
            codes.contiguous(), groups.to(torch.int32), counts, samples, neurons, BLOCK, num_warps=WARPS
        )


@dataclass
class Into:
    """Where the scores of one projection of one layer are added."""

    total: Tensor
    """float64 [groups, neurons], neighbours in a row: sums of scores."""
    low: Tensor
    """int64 []: scores above zero and below the histogram's range …"""
    high: Tensor
    """… and above it."""
    counts: Tensor | None
    """int32 [groups, neurons, 256], contiguous; None where they lie elsewhere and bins are wanted."""


def add_scores(sums: Tensor, lengths: Tensor | None, groups: Tensor, into: Into, lowest_octave: int) -> Tensor | None:
    """Scores from each sample's sums over its tokens, counted and added up, in one launch on a GPU.

    sums: float32 [samples, neurons]. A score is |sum / length|, lengths float32 [samples] (CANEFT Eq. 8), or |sum|
    where lengths is None. groups: int32 [samples]. Returns the scores' bins, uint8 [samples, neurons], where
    `into.counts` is None. Only where `use_triton(sums)`; statistics.py has the same in torch.
    """
    codes = torch.empty(sums.shape, dtype=torch.uint8, device=sums.device) if into.counts is None else None
    _launch(sums, lengths, groups, into.counts, codes, into, lowest_octave)
    return codes


def _launch(sums, lengths, groups, counts, codes, into: Into | None, lowest_octave: int) -> None:
    samples, neurons = sums.shape
    rows = counts.shape[0] if into is None else into.total.shape[0]
    total, low, high, stride = (
        (None, None, None, 0) if into is None else (into.total, into.low, into.high, into.total.stride(0))
    )
    least, most = 2.0**lowest_octave, 2.0 ** (lowest_octave + OCTAVES)
    most = min(most, torch.finfo(torch.float32).max)  # 2**128 is none: nothing finite lies above the highest window
    with on_device(sums):
        _histogram_kernel[(-(-neurons // BLOCK), rows)](
            sums.contiguous(), lengths, groups.to(torch.int32), counts, codes, total, low, high,
            samples, neurons, (127 + lowest_octave) << 3, stride, least, most, BLOCK, num_warps=WARPS,
        )  # fmt: skip


def add_units(
    active: Tensor, activation: Tensor, lengths: Tensor, groups: Tensor, counts: Tensor, total: Tensor
) -> None:
    """Activity of one layer's units by group, in one launch; only where `use_triton(activation)`.

    active: int32, activation: float32 [samples, units], sums over a sample's tokens; lengths: float32 [samples];
    groups: int32 [samples]. counts, int64, gets the active tokens; total, float64, the mean activation of each sample;
    both [groups, units] of one row stride.
    """
    samples, units = activation.shape
    assert counts.stride() == total.stride(), (counts.stride(), total.stride())
    with on_device(activation):
        _units_kernel[(-(-units // BLOCK), counts.shape[0])](
            active, activation, lengths, groups, counts, total, samples, units, counts.stride(0), BLOCK, num_warps=WARPS
        )


def aot() -> list[AotCase]:
    """The one pinned configuration in each use. Bytes: the score, and a sector of the counts read and written."""
    sizes = dict.fromkeys(("samples", "neurons", "first_bin", "stride"), "i32") | {"least": "fp32", "most": "fp32"}
    inputs = {"scores": "*fp32", "lengths": "*fp32", "groups": "*i32"}
    totals = {"total": "*fp64", "low": "*i64", "high": "*i64"}
    units = {"active": "*i32", "activation": "*fp32", "lengths": "*fp32", "groups": "*i32"}
    options = {"num_warps": WARPS}

    def case(name: str, signature: dict[str, str], moved: float, kernel=_histogram_kernel) -> AotCase:
        every = {x: signature[x] for x in (p.name for p in kernel.params) if x in signature}
        divisible = ("neurons",) if "neurons" in every else ("units",)
        least = moved - 56 if "counts" in every and kernel is not _units_kernel else moved
        return AotCase(
            name, kernel, every, {"BLOCK": BLOCK}, options, divisible, bytes_moved=moved, bytes_minimum=least,
            element="score", streaming=False,
        )  # fmt: skip

    whole = inputs | totals | sizes
    return [
        case("histogram", {"scores": "*fp32", "groups": "*i32", "counts": "*i32"} | sizes, 4 + 64),
        case("histogram and totals", whole | {"counts": "*i32"}, 4 + 64),
        case("bins and totals", whole | {"codes": "*u8"}, 5),
        case(
            "bins counted",
            {"codes": "*u8", "groups": "*i32", "counts": "*i32", "samples": "i32", "neurons": "i32"},
            1 + 64,
            _count_kernel,
        ),
        case(
            "units",
            units | {"counts": "*i64", "total": "*fp64", "samples": "i32", "units": "i32", "stride": "i32"},
            8,
            _units_kernel,
        ),
    ]


def _check_octave(lowest_octave: int) -> None:
    if not LOWEST <= lowest_octave <= HIGHEST:
        raise ValueError(f"lowest_octave {lowest_octave}: must be in [{LOWEST}, {HIGHEST}]")


def _check(values: Tensor, groups: Tensor, counts: Tensor, dtype: torch.dtype) -> None:
    assert values.dtype == dtype, values.dtype
    assert values.dim() == 2, values.shape
    assert groups.shape == values.shape[:1], (groups.shape, values.shape)
    assert counts.dtype == torch.int32, counts.dtype
    assert counts.is_contiguous()
    assert counts.shape[1:] == (values.shape[1], BINS), (counts.shape, values.shape)
