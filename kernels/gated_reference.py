"""The gated activation in plain torch: the specification of `gated.py`'s kernels, and the path a CPU takes.

`*_reference` are the formulas over whole tensors; `forward_torch` and `backward_torch` run the same blocks of rows
one after another, so that their temporaries stay in cache.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .activations import fused_pull, fused_value, value, value_and_slope
from .fold import host_tiles
from .outputs import Reduce
from .torch_blocks import add_sums, block_rows, compute, copy_columns, gain_rows, reference_columns, reference_sums


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


def gated_forward_reference(
    gate: Tensor, up: Tensor, activation: str, gain: Tensor | None = None, route: Tensor | None = None
) -> Tensor:
    """h [T, I] in the dtype of gate: the specification of `gated_forward`."""
    g, u, c = compute(gate), compute(up), gain_rows(gain, route, 0, gate.shape[0])
    h = value(g, activation) * u if c is None else torch.where(c == 0, 0, value(c * g, activation) * (c * u))
    return h.to(gate.dtype)


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
    d, g, u, c = compute(dh), compute(gate), compute(up), gain_rows(gain, route, 0, gate.shape[0])
    if c is None:
        act, slope = value_and_slope(g, activation)
        dg, du, h, on = slope * u * d, act * d, act * u, g > 0
    else:
        act, slope = value_and_slope(c * g, activation)
        dg, du, h = (torch.where(c == 0, 0, x) for x in (c * slope * (c * u) * d, c * act * d, act * (c * u)))
        on = c * g > 0
    sums = reference_sums(g * dg, u * du, on, h, segments, reduce)
    columns = reference_columns((dg, du, h), (gate_columns, up_columns, h_columns), gate.dtype)
    return GatedBackward(dg.to(gate.dtype), du.to(up.dtype), *sums, h.to(gate.dtype) if emit_h else None, *columns)


def forward_torch(
    gate: Tensor, up: Tensor, activation: str, gain: Tensor | None, route: Tensor | None, h: Tensor
) -> None:
    """`gated_forward` into h."""
    for begin, end, _ in host_tiles(None, gate.shape[0], block_rows(gate.shape[1])):
        g, u, c = compute(gate[begin:end]), compute(up[begin:end]), gain_rows(gain, route, begin, end)
        if c is None:
            h[begin:end] = fused_value(g, activation).mul_(u)
        else:
            h[begin:end] = fused_value(c * g, activation).mul_(c * u).masked_fill_(c == 0, 0)


def _backward_block(d: Tensor, g: Tensor, u: Tensor, activation: str, c: Tensor | None) -> tuple[Tensor, ...]:
    """dg, du and act(c·g) of a block, zero where c = 0."""
    if c is None:
        act = fused_value(g, activation)
        return fused_pull(u * d, g, activation), act * d, act
    g, u, off = c * g, c * u, c == 0
    act = fused_value(g, activation).masked_fill_(off, 0)
    return fused_pull(u * d, g, activation).mul_(c).masked_fill_(off, 0), (c * act).mul_(d), act


def backward_torch(dh, gate, up, activation, gain, route, segments, signed, indices, dgate, dup, h, sums, columns):
    """Block by block, so that temporaries stay in cache; dgate, dup, h may be gate, up, dh themselves."""
    tokens, width = gate.shape
    if segments is not None:
        sums.zero_()
    for begin, end, sample in host_tiles(segments, tokens, block_rows(width)):
        rows = slice(begin, end)
        g, u = compute(gate[rows]), compute(up[rows])
        c = gain_rows(gain, route, begin, end)
        dg, du, h_rows = _backward_block(compute(dh[rows]), g, u, activation, c)
        if sample >= 0 or h is not None or indices[2] is not None:
            h_rows.mul_(u) if c is None else h_rows.mul_(c * u).masked_fill_(c == 0, 0)
        if sample >= 0:
            add_sums(sums[:, sample], g * dg, u * du, g > 0 if c is None else c * g > 0, h_rows, signed)
        copy_columns(columns, (dg, du, h_rows), indices, rows)
        dgate[rows], dup[rows] = dg, du
        if h is not None:
            h[rows] = h_rows
