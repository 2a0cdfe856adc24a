"""The gated activation in plain torch: the specification of `gated.py`'s kernels, and the path a CPU takes.

`*_reference` are the formulas over whole tensors; `forward_torch` and `backward_torch` run the same blocks of rows
one after another, so that their temporaries stay in cache.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .activations import value, value_and_slope
from .fold import host_tiles, segment_sums

Reduce = Literal["mean_abs", "abs_sum"]
# Elements of one block of the torch path: its dozen temporaries stay in the cache of a core.
CPU_BLOCK = 1 << 16


@dataclass
class GatedBackward:
    """What one backward pass gives; fields that were not asked for are None. T tokens, S samples, I units."""

    dgate: Tensor
    """[T, I], dtype of gate."""
    dup: Tensor
    """[T, I], dtype of up."""
    gate_score: Tensor | None = None
    """float32 [S, I]: sum over the segment's tokens of |g·dg| (`mean_abs`) or of g·dg, signed (`abs_sum`)."""
    up_score: Tensor | None = None
    """float32 [S, I]: the same of u·du, which is h·dh."""
    active: Tensor | None = None
    """int32 [S, I]: tokens of the segment with c·g > 0."""
    activation: Tensor | None = None
    """float32 [S, I]: sum of h over the segment."""
    h: Tensor | None = None
    """[T, I], recomputed."""
    dgate_columns: Tensor | None = None
    """[T, k]: dgate[:, gate_columns]."""
    dup_columns: Tensor | None = None
    """[T, k]: dup[:, up_columns]."""
    h_columns: Tensor | None = None
    """[T, k]: h[:, h_columns]."""


def compute(x: Tensor) -> Tensor:
    """Half precision is computed in float32, float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def gain_rows(gain: Tensor | None, route: Tensor | None, begin: int, end: int) -> Tensor | None:
    """The gain of tokens [begin, end), [tokens, I] or [1, I]; None without routing."""
    if gain is None:
        return None
    return gain[:1] if route is None else gain[route[begin:end]]


def _forward_block(gate: Tensor, up: Tensor, activation: str, c: Tensor | None) -> Tensor:
    g, u = compute(gate), compute(up)
    if c is None:
        return value(g, activation) * u
    return torch.where(c == 0, 0, value(c * g, activation) * (c * u))


def _backward_block(dh: Tensor, gate: Tensor, up: Tensor, activation: str, c: Tensor | None) -> tuple[Tensor, ...]:
    """dg, du and h of a block in the dtype of computation.

    dg = c·act'(c·g)·(c·u)·dh, du = c·act(c·g)·dh; all zero where c = 0.
    """
    d, g, u = compute(dh), compute(gate), compute(up)
    if c is not None:
        g, u = c * g, c * u
    act, slope = value_and_slope(g, activation)
    dg, du, h = slope * u * d, act * d, act * u
    if c is not None:
        off = c == 0
        dg, du, h = ((x * scale).masked_fill(off, 0) for x, scale in ((dg, c), (du, c), (h, 1)))
    return dg, du, h


def gated_forward_reference(
    gate: Tensor, up: Tensor, activation: str, gain: Tensor | None = None, route: Tensor | None = None
) -> Tensor:
    """h [T, I] in the dtype of gate: the specification of `gated_forward`."""
    return _forward_block(gate, up, activation, gain_rows(gain, route, 0, gate.shape[0])).to(gate.dtype)


def gated_backward_reference(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    gain: Tensor | None = None,
    route: Tensor | None = None,
    *,
    segments: Tensor | None = None,
    reduce: Reduce = "mean_abs",
    gate_columns: Tensor | None = None,
    up_columns: Tensor | None = None,
    h_columns: Tensor | None = None,
    emit_h: bool = False,
) -> GatedBackward:
    """The specification of `gated_backward`: the formulas over whole tensors."""
    c = gain_rows(gain, route, 0, gate.shape[0])
    dg, du, h = _backward_block(dh, gate, up, activation, c)
    out = GatedBackward(dg.to(gate.dtype), du.to(up.dtype), h=h.to(gate.dtype) if emit_h else None)
    if segments is not None:
        fold = torch.abs if reduce == "mean_abs" else torch.clone
        g = compute(gate)
        on = g > 0 if c is None else c * g > 0
        out.gate_score = segment_sums(fold(g * dg), segments)
        out.up_score = segment_sums(fold(compute(up) * du), segments)
        out.active = segment_sums(on.int(), segments).int()
        out.activation = segment_sums(h, segments)
    for name, x, index in (("dgate", dg, gate_columns), ("dup", du, up_columns), ("h", h, h_columns)):
        if index is not None:
            setattr(out, f"{name}_columns", x[:, index].to(gate.dtype))
    return out


def block_rows(width: int) -> int:
    return max(1, CPU_BLOCK // max(width, 1))


def forward_torch(
    gate: Tensor, up: Tensor, activation: str, gain: Tensor | None, route: Tensor | None, h: Tensor
) -> None:
    """`gated_forward` into h."""
    for begin, end, _ in host_tiles(None, gate.shape[0], block_rows(gate.shape[1])):
        h[begin:end] = _forward_block(gate[begin:end], up[begin:end], activation, gain_rows(gain, route, begin, end))


def backward_torch(dh, gate, up, activation, gain, route, segments, signed, indices, dgate, dup, h, sums, columns):
    """Block by block, so that temporaries stay in cache; dgate, dup, h may be gate, up, dh themselves."""
    tokens, width = gate.shape
    if segments is not None:
        sums.zero_()
    for begin, end, sample in host_tiles(segments, tokens, block_rows(width)):
        rows = slice(begin, end)
        c = gain_rows(gain, route, begin, end)
        dg, du, h_rows = _backward_block(dh[rows], gate[rows], up[rows], activation, c)
        if sample >= 0:
            scores = compute(gate[rows]) * dg, compute(up[rows]) * du
            on = gate[rows] > 0 if c is None else c * compute(gate[rows]) > 0
            for into, x in zip(sums[:, sample], (*scores, on, h_rows), strict=True):
                into += x.sum(0) if signed or x is on or x is h_rows else x.abs().sum(0)
        for into, x, index in zip(columns, (dg, du, h_rows), indices, strict=True):
            if index is not None:
                into[rows] = x[:, index].to(into.dtype)
        dgate[rows], dup[rows] = dg, du
        if h is not None:
            h[rows] = h_rows
