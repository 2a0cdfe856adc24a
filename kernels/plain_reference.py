"""The plain activation in torch: the specification of `plain.py`'s kernels, and the path a CPU takes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .activations import fused_pull, fused_value, value, value_and_slope
from .fold import host_tiles
from .outputs import Reduce
from .torch_blocks import add_sums, block_rows, compute, copy_columns, gain_rows, reference_columns, reference_sums


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
    c = gain_rows(gain, route, 0, pre.shape[0])
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
    c = gain_rows(gain, route, 0, pre.shape[0])
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
    for begin, end, _ in host_tiles(None, pre.shape[0], block_rows(pre.shape[1])):
        c = gain_rows(gain, route, begin, end)
        block = fused_value(_inner(pre[begin:end], bias, c), activation)
        h[begin:end] = block if c is None else block.masked_fill_(c == 0, 0)


def _backward_block(d: Tensor, z: Tensor, activation: str, c: Tensor | None) -> tuple[Tensor, ...]:
    """dpre, dz, h and whether the unit is active of a block."""
    h, dz, on = fused_value(z, activation), fused_pull(d, z, activation), z > 0
    if c is None:
        return dz, dz, h, on
    off = c == 0
    dz.masked_fill_(off, 0)
    return c * dz, dz, h.masked_fill_(off, 0), on & ~off


def backward_torch(dh, pre, activation, bias, gain, route, segments, signed, indices, dpre, h, sums, columns) -> None:
    """Block by block, so that temporaries stay in cache; `sums` [4, S, I]: scores of z, of h, active, sums of h."""
    tokens, width = pre.shape
    if segments is not None:
        sums.zero_()
    for begin, end, sample in host_tiles(segments, tokens, block_rows(width)):
        rows = slice(begin, end)
        c = gain_rows(gain, route, begin, end)
        z = _inner(pre[rows], bias, c)
        d = compute(dh[rows])
        dpre_rows, dz, h_rows, on = _backward_block(d, z, activation, c)
        if sample >= 0:
            add_sums(sums[:, sample], z * dz, h_rows * d, on, h_rows, signed)
        copy_columns(columns, (dpre_rows, h_rows), indices, rows)
        dpre[rows] = dpre_rows
        if h is not None:
            h[rows] = h_rows
