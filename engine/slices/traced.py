"""The FFN for a compiler: the function of fused.py from tensors alone, which torch.compile traces through.

    h = act(x Wgᵀ) · (x Wuᵀ),   y = h Wdᵀ

The activation is written as its formula: the compiler fuses it, forward and backward, with what stands around it, and
decides itself what to keep and what to compute again. Of a weight's gradient only the slices are made, by the operation
`slice_gradient`. Nothing is written into the weights here: they hold the slices already. Next: compiled.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...kernels.common.activations import value
from ...kernels.slice_gradient import compact_gradient, row_gradient
from .linear import SliceLinear, cast_for_autocast


class Slices(NamedTuple):
    """A layer's trained slices and where they lie, as tensors that are no parameters.

    A compiler takes the shape of a parameter for a constant, and would compile every block that trains another number
    of neurons anew.
    """

    rows: Tensor | None
    columns: Tensor | None
    bias_rows: Tensor | None
    row_index: Tensor | None
    column_index: Tensor | None

    @classmethod
    def of(cls, linear: SliceLinear) -> Slices:
        parts = linear.rows, linear.columns, linear.bias_rows, linear.row_index, linear.column_index
        return cls(*(None if part is None else part.view_as(part) for part in parts))


def for_compiler(ffn: nn.Module) -> bool:
    """Whether compiled.py has put the slices where a compiler finds them."""
    return all(hasattr(linear, "for_compiler") for linear in ffn.linears() if isinstance(linear, SliceLinear))


def traced(ffn: nn.Module, x: Tensor) -> Tensor:
    """y (..., H) of x (..., H). With `ffn.recompute` x alone is kept, and the rest computed again in the backward."""
    if ffn.recompute:
        return checkpoint(_forward, ffn, x, use_reentrant=False)
    return _forward(ffn, x)


def _forward(ffn: nn.Module, x: Tensor) -> Tensor:
    *first, last = ffn.linears()
    pre = [_linear(linear, x.reshape(-1, x.shape[-1])) for linear in first]
    pre = pre[0].chunk(2, -1) if ffn.packed else pre
    wide = torch.promote_types(pre[0].dtype, torch.float32)
    h = value(pre[0].to(wide), ffn.activation)
    if len(pre) == 2:
        h = h * pre[1].to(wide)
    return _linear(last, h.to(pre[0].dtype)).view(*x.shape[:-1], -1)


def _linear(linear: nn.Linear | SliceLinear, x: Tensor) -> Tensor:
    x, weight, bias = cast_for_autocast(x, linear.weight, linear.bias)
    if not isinstance(linear, SliceLinear):
        return F.linear(x, weight, bias)
    return _TracedLinear.apply(x, weight, bias, *linear.for_compiler)


class _TracedLinear(torch.autograd.Function):
    """y = x Wᵀ + b; the gradient reaches x [T, in] and the slices, never the frozen weight."""

    @staticmethod
    def forward(ctx, x, weight, bias, rows, columns, bias_rows, row_index, column_index):
        ctx.x_dtype = x.dtype
        ctx.dtypes = [None if part is None else part.dtype for part in (rows, columns, bias_rows)]
        kept = x if columns is None else x.index_select(1, column_index)
        ctx.save_for_backward(kept, weight, row_index)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight, row_index = ctx.saved_tensors
        rows, columns, bias_rows = ctx.dtypes
        dx = (dy @ weight).to(ctx.x_dtype) if ctx.needs_input_grad[0] else None
        d_rows = None if rows is None else row_gradient(dy, x, row_index).to(rows)
        d_columns = None if columns is None else compact_gradient(x, dy).to(columns)
        wide = torch.promote_types(dy.dtype, torch.float32)
        d_bias = None if bias_rows is None else dy.index_select(1, row_index).sum(0, dtype=wide).to(bias_rows)
        return dx, None, None, d_rows, d_columns, d_bias, None, None
