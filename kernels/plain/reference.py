"""The plain activation in torch: the specification of the kernels, and the path a CPU takes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.activations import value, value_and_slope
from ..common.outputs import Reduce
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
class PlainBackward:
    """What one backward pass gives; fields that were not asked for are None. T tokens, S samples, I units."""

    dpre: Tensor
    """[T, I], dtype of pre: the gradient of pre, which is c times the gradient of z = c·pre + bias."""
    score: Tensor | None = None
    """float32 [S, I]: sum over the segment's tokens of |z·dz| (`mean_abs`) or of z·dz, signed (`abs_sum`)."""
    unit_score: Tensor | None = None
    """float32 [S, I]: the same of h·dh, the unit's output times its gradient (LANDeRMT Eq. 4; `up_score` if gated)."""
    active: Tensor | None = None
    """int32 [S, I]: tokens of the segment with z > 0 and c ≠ 0."""
    activation: Tensor | None = None
    """float32 [S, I]: sum of h over the segment."""
    h: Tensor | None = None
    """[T, I], recomputed."""
    dpre_columns: Tensor | None = None
    """[T, k]: dpre[:, pre_columns]."""
    h_columns: Tensor | None = None
    """[T, k]: h[:, h_columns]."""


def _inner(pre: Tensor, bias: Tensor | None, c: Tensor | None) -> Tensor:
    """z = c·pre + bias in the dtype of computation."""
    z = compute(pre) if c is None else c * compute(pre)
    return z if bias is None else z + compute(bias)


def plain_forward_reference(
    pre: Tensor,
    activation: str,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    route: Tensor | None = None,
) -> Tensor:
    """h [T, I] in the dtype of pre: the specification of `plain_forward`."""
    c = gain_rows(gain, route)
    h = value(_inner(pre, bias, c), activation)
    return (h if c is None else torch.where(c == 0, 0, h)).to(pre.dtype)


def plain_backward_reference(
    dh: Tensor,
    pre: Tensor,
    activation: str,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    route: Tensor | None = None,
    *,
    segments: Tensor | None = None,
    reduce: Reduce = "mean_abs",
    pre_columns: Tensor | None = None,
    h_columns: Tensor | None = None,
    emit_h: bool = False,
) -> PlainBackward:
    """The specification of `plain_backward`: the formulas over whole tensors."""
    c = gain_rows(gain, route)
    z = _inner(pre, bias, c)
    h, slope = value_and_slope(z, activation)
    dpre = dz = slope * compute(dh)
    on = z > 0
    if c is not None:
        h, dz, on = torch.where(c == 0, 0, h), torch.where(c == 0, 0, dz), on & (c != 0)
        dpre = c * dz
    sums = reference_sums(z * dz, h * compute(dh), on, h, segments, reduce)
    columns = reference_columns((dpre, h), (pre_columns, h_columns), pre.dtype)
    return PlainBackward(dpre.to(pre.dtype), *sums, h.to(pre.dtype) if emit_h else None, *columns)


def forward_torch(pre, activation, bias, gain, route, h) -> None:
    """`plain_forward` into h."""
    for block in blocks_of(pre):
        rows = block.rows
        c = gain_rows(gain, route, rows)
        z = _inner(pre[rows], bias, c)
        direct = h[rows] if h.dtype == z.dtype else None
        h_rows = block.value(z, activation, out=direct)
        if c is not None:
            h_rows.masked_fill_(c == 0, 0)
        if direct is None:
            h[rows] = h_rows


def backward_torch(dh, pre, activation, bias, gain, route, segments, signed, indices, dpre, h, sums, columns) -> None:
    """`plain_backward` into dpre and h, which may be pre and dh themselves, and into sums and columns."""
    if segments is not None:
        sums.zero_()
    for block in blocks_of(pre, segments):
        rows = block.rows
        d, c = compute(dh[rows]), gain_rows(gain, route, rows)
        z = _inner(pre[rows], bias, c)
        h_rows, dz = block.value(z, activation), block.pull(d, z, activation, out=torch.empty_like(z))
        if c is not None:
            for x in (h_rows, dz, z):
                x.masked_fill_(c == 0, 0)
        dpre_rows = dz if c is None else c * dz
        if segments is not None:
            first, second = z * dz, h_rows * d
            if not signed:
                first.abs_(), second.abs_()
            block.add_sums(sums, first, second, positive(z), h_rows)
        copy_columns(columns, (dpre_rows, h_rows), indices, rows)
        dpre[rows] = dpre_rows
        if h is not None:
            h[rows] = h_rows
    if segments is not None:
        count_as_bits(sums)
