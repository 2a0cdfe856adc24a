"""The gated activation in plain torch: the specification of the kernels, and the path a CPU takes.

`*_reference` are the formulas over whole tensors; `forward_torch` and `backward_torch` run the same blocks of rows
one after another, so that their temporaries stay in cache.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.activations import value, value_and_slope
from ..common.outputs import Reduce, wide
from ..common.torch_blocks import (
    blocks_of,
    compute,
    copy_columns,
    count_as_bits,
    gain_rows,
    positive,
    reference_columns,
    reference_sums,
)


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
    g, u, c = compute(gate), compute(up), gain_rows(gain, route)
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
    d, g, u, c = compute(dh), compute(gate), compute(up), gain_rows(gain, route)
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
    for block in blocks_of(gate):
        rows = block.rows
        g, u, c = compute(gate[rows]), compute(up[rows]), gain_rows(gain, route, rows)
        if c is not None:
            g, u = c * g, c * u
        direct = h[rows] if h.dtype == g.dtype else None
        h_rows = block.value(g, activation, out=direct).mul_(u)
        if c is not None:
            h_rows.masked_fill_(c == 0, 0)
        if direct is None:
            h[rows] = h_rows


def backward_torch(dh, gate, up, activation, gain, route, segments, signed, indices, dgate, dup, h, sums, columns):
    """`gated_backward` into dgate, dup, h, which may be gate, up, dh themselves, and into sums and columns."""
    if segments is not None:
        sums.zero_()
    # Gradients are written at once, unless they would lie over gate and up while the scores still want those.
    direct = segments is None and dgate.dtype == wide(dgate)
    for block in blocks_of(gate, segments):
        rows = block.rows
        d, g, u, c = compute(dh[rows]), compute(gate[rows]), compute(up[rows]), gain_rows(gain, route, rows)
        cg, cu = (g, u) if c is None else (c * g, c * u)
        act, pull = block.value(cg, activation), cu * d
        wants_h = segments is not None or h is not None or indices[2] is not None
        h_rows = act * cu if wants_h else None
        if c is not None:
            act.mul_(c)
        du = torch.mul(act, d, out=dup[rows] if direct else act)
        dg = block.pull(pull, cg, activation, out=dgate[rows] if direct else pull)
        if c is not None:
            dg.mul_(c)
            for x in (dg, du) if h_rows is None else (dg, du, h_rows):
                x.masked_fill_(c == 0, 0)
        if segments is not None:
            first, second = g * dg, u * du
            if not signed:
                first.abs_(), second.abs_()
            block.add_sums(sums, first, second, positive(cg), h_rows)
        copy_columns(columns, (dg, du, h_rows), indices, rows)
        if not direct:
            dgate[rows], dup[rows] = dg, du
        if h is not None:
            h[rows] = h_rows
    if segments is not None:
        count_as_bits(sums)
