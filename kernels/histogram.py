"""Histograms of scores by their float bits: counts[group, neuron, bin] += 1 for each sample, the same bits every run.

A bin is the exponent and the three leading mantissa bits of the float32 score: 8 bins an octave, 256 bins from
2**lowest_octave on. Integers are added, and only by the program that owns the neuron and the group, so no order of
execution can change a result and nothing is atomic.
"""

import torch
from torch import Tensor

from .compile import AotCase
from .dispatch import jit, on_device, tl, use_triton

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
    """`accumulate` in plain torch: one integer scatter-add a chunk of neurons, a neuron's samples side by side."""
    neurons = scores.shape[1]
    flat = counts.view(-1)
    one = torch.ones((), dtype=counts.dtype, device=counts.device)
    first = (groups.to(torch.int64) * (neurons * BINS))[None]
    step = max(1, _CHUNK // max(1, scores.shape[0]))
    for start in range(0, neurons, step):
        block = bins(scores[:, start : start + step], lowest_octave).t().contiguous().to(torch.int64)
        own = torch.arange(start, start + block.shape[0], device=counts.device) * BINS
        index = block.add_(own[:, None]).add_(first).view(-1)
        flat.scatter_add_(0, index, one.expand(index.shape))


@jit
def _histogram_kernel(scores, groups, counts, samples, neurons, first_bin, BLOCK: tl.constexpr):
    # A thread reads and writes the same neurons in every iteration, so its own program order keeps them apart.
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = tl.program_id(1)
    mask = n < neurons
    row = counts + (group.to(tl.int64) * neurons + n) * 256
    sample = scores + n
    for s in range(samples):
        if tl.load(groups + s) == group:
            score = tl.load(sample, mask=mask, other=0.0)
            code = (score.to(tl.int32, bitcast=True) >> 20) - first_bin
            cell = row + tl.minimum(tl.maximum(code, 0), 255)
            tl.store(cell, tl.load(cell, mask=mask, other=0) + 1, mask=mask)
        sample += neurons


def accumulate(scores: Tensor, groups: Tensor, counts: Tensor, lowest_octave: int) -> None:
    """Count every sample's score of every neuron, in place: counts[groups[s], n, bin(scores[s, n])] += 1.

    scores: float32 [samples, neurons]. groups: integer [samples], each in [0, counts.shape[0]). counts: contiguous
    int32 [groups, neurons, 256]. Raises ValueError when lowest_octave is not in [-126, 96].
    """
    _check(scores, groups, counts)
    _check_octave(lowest_octave)
    if scores.numel() == 0:
        return
    if not use_triton(scores):
        accumulate_reference(scores, groups, counts, lowest_octave)
        return
    samples, neurons = scores.shape
    grid = (-(-neurons // BLOCK), counts.shape[0])
    first_bin = (127 + lowest_octave) << 3
    with on_device(scores):
        _histogram_kernel[grid](
            scores.contiguous(), groups.to(torch.int32), counts, samples, neurons, first_bin, BLOCK, num_warps=WARPS
        )


def aot() -> list[AotCase]:
    """The one pinned configuration. Bytes: the score, and a 32-byte sector of the counts read and written."""
    signature = {"scores": "*fp32", "groups": "*i32", "counts": "*i32", "samples": "i32", "neurons": "i32"}
    return [
        AotCase(
            name="histogram",
            kernel=_histogram_kernel,
            signature={**signature, "first_bin": "i32"},
            constexprs={"BLOCK": BLOCK},
            options={"num_warps": WARPS},
            divisible=("neurons",),
            bytes_moved=4 + 64,
            bytes_minimum=4 + 8,
            element="score",
            streaming=False,
        )
    ]


def _check_octave(lowest_octave: int) -> None:
    if not LOWEST <= lowest_octave <= HIGHEST:
        raise ValueError(f"lowest_octave {lowest_octave}: must be in [{LOWEST}, {HIGHEST}]")


def _check(scores: Tensor, groups: Tensor, counts: Tensor) -> None:
    assert scores.dtype == torch.float32, scores.dtype
    assert scores.dim() == 2, scores.shape
    assert groups.shape == scores.shape[:1], (groups.shape, scores.shape)
    assert counts.dtype == torch.int32, counts.dtype
    assert counts.is_contiguous()
    assert counts.shape[1:] == (scores.shape[1], BINS), (counts.shape, scores.shape)
