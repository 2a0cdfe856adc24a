"""The plain activation in torch: the specification of `plain.py`'s kernels, and the path a CPU takes."""

from dataclasses import dataclass

from torch import Tensor

from .activations import value, value_and_slope
from .fold import host_tiles, segment_sums
from .gated_reference import Reduce, block_rows, compute, gain_rows


@dataclass
class PlainBackward:
    """What one backward pass gives; fields that were not asked for are None. T tokens, S samples, I units."""

    dpre: Tensor
    """[T, I], dtype of pre: the gradient of pre, which is c times the gradient of z = c·pre + bias."""
    score: Tensor | None = None
    """float32 [S, I]: sum over the segment's tokens of |z·dz| (`mean_abs`) or of z·dz, signed (`abs_sum`)."""
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


def _forward_block(pre: Tensor, activation: str, bias: Tensor | None, c: Tensor | None) -> Tensor:
    h = value(_inner(pre, bias, c), activation)
    return h if c is None else h.masked_fill(c == 0, 0)


def _backward_block(dh: Tensor, pre: Tensor, activation: str, bias: Tensor | None, c: Tensor | None):
    """dpre, z·dz, "active" and h of a block; all zero where c = 0."""
    z = _inner(pre, bias, c)
    h, slope = value_and_slope(z, activation)
    dz = slope * compute(dh)
    if c is None:
        return dz, z * dz, z > 0, h
    dz, h = dz.masked_fill(c == 0, 0), h.masked_fill(c == 0, 0)
    return c * dz, z * dz, (z > 0) & (c != 0), h


def plain_forward_reference(
    pre: Tensor,
    activation: str,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    route: Tensor | None = None,
) -> Tensor:
    """h [T, I] in the dtype of pre: the specification of `plain_forward`."""
    return _forward_block(pre, activation, bias, gain_rows(gain, route, 0, pre.shape[0])).to(pre.dtype)


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
    dpre, score, on, h = _backward_block(dh, pre, activation, bias, gain_rows(gain, route, 0, pre.shape[0]))
    out = PlainBackward(dpre.to(pre.dtype), h=h.to(pre.dtype) if emit_h else None)
    if segments is not None:
        out.score = segment_sums(score.abs() if reduce == "mean_abs" else score, segments)
        out.active = segment_sums(on.int(), segments).int()
        out.activation = segment_sums(h, segments)
    if pre_columns is not None:
        out.dpre_columns = dpre[:, pre_columns].to(pre.dtype)
    if h_columns is not None:
        out.h_columns = h[:, h_columns].to(pre.dtype)
    return out


def forward_torch(pre, activation, bias, gain, route, h) -> None:
    """`plain_forward` into h."""
    for begin, end, _ in host_tiles(None, pre.shape[0], block_rows(pre.shape[1])):
        h[begin:end] = _forward_block(pre[begin:end], activation, bias, gain_rows(gain, route, begin, end))


def backward_torch(dh, pre, activation, bias, gain, route, segments, signed, indices, dpre, h, sums, columns) -> None:
    """Block by block; dpre and h may be pre and dh themselves."""
    tokens, width = pre.shape
    if segments is not None:
        sums.zero_()
    for begin, end, sample in host_tiles(segments, tokens, block_rows(width)):
        rows = slice(begin, end)
        c = gain_rows(gain, route, begin, end)
        dpre_rows, score, on, h_rows = _backward_block(dh[rows], pre[rows], activation, bias, c)
        if sample >= 0:
            for into, x in zip(sums[:, sample], (score if signed else score.abs(), on, h_rows), strict=True):
                into += x.sum(0)
        for into, x, index in zip(columns, (dpre_rows, h_rows), indices, strict=True):
            if index is not None:
                into[rows] = x[:, index].to(into.dtype)
        dpre[rows] = dpre_rows
        if h is not None:
            h[rows] = h_rows
