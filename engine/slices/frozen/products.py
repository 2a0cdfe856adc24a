"""The two products of a layer, whichever way its weight is held: x · W̃ᵀ forward and dy · W̃ backward.

W̃ is the frozen weight with the trained rows or columns in their places. A plain weight holds them; a quantised one is
made floats for the moment, one layer at a time, and they are copied in: it costs one more pass over the weight and is
the very function that a full-precision layer of those values computes. Only fp8 multiplies by its stored values, where
the slices' places are zeros, and adds the slices' own products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.quantised import float8
from ...models.quantised.float8 import Float8Linear
from ...models.quantised.layers import dequantised, kind
from .layer import Part, SlicedLinear


def product(x: Tensor, linear: nn.Module, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """x [..., in] · W̃ᵀ + bias → [..., out]; `dtype` is autocast's, in which x and the bias are already."""
    layer = quantised_layer(linear)
    if not isinstance(layer, Float8Linear):
        return F.linear(x, dense(linear, dtype if layer is None else x.dtype), bias)
    shape, x = x.shape, x.reshape(-1, x.shape[-1])
    y = float8.product(x, layer.values, layer.scales)
    for values, _, axis, index in _weight_parts(linear):
        if axis:
            y.addmm_(x.index_select(1, index), values.to(x.dtype))
        else:
            y.index_copy_(1, index, F.linear(x, values.to(x.dtype)))
    y = y if bias is None else y.add_(bias)
    return y.view(*shape[:-1], -1)


def pull(dy: Tensor, linear: nn.Module, onto: Tensor | None = None) -> Tensor:
    """dy [..., out] · W̃ → [..., in], added to `onto` [T, in] in place where that is given, of a dy [T, out] then."""
    layer = quantised_layer(linear)
    if not isinstance(layer, Float8Linear):
        weight = dense(linear, dy.dtype)
        return dy @ weight if onto is None else onto.addmm_(dy, weight)
    shape, dy = dy.shape, dy.reshape(-1, dy.shape[-1])
    dx = float8.pull(dy, layer.values, layer.scales)
    for values, _, axis, index in _weight_parts(linear):
        if axis:
            dx.index_copy_(1, index, dy @ values.to(dy.dtype).t())
        else:
            dx.addmm_(dy.index_select(1, index), values.to(dy.dtype))
    return dx.view(*shape[:-1], -1) if onto is None else onto.add_(dx)


def dense(linear: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """W̃ [out, in] in `dtype` (None: its own). A plain layer's is the weight itself, which holds the slices."""
    layer = quantised_layer(linear)
    if layer is None:
        return linear.weight if dtype is None else linear.weight.to(dtype)
    weight = dequantised(layer, dtype or layer.stored.dtype)
    for values, _, axis, index in _weight_parts(linear):
        weight.index_copy_(axis, index, (values.t() if axis else values).to(weight.dtype))
    return weight


def quantised_layer(linear: nn.Module) -> nn.Module | None:
    """The quantised layer that it is, or has in it; None of a plain one."""
    if isinstance(linear, SlicedLinear):
        return linear.frozen
    return linear if type(linear) is not nn.Linear and kind(linear) else None


def dtype_of(linear: nn.Module) -> torch.dtype:
    """Of the values that it takes and gives."""
    layer = quantised_layer(linear)
    return linear.weight.dtype if layer is None else layer.stored.dtype


def _weight_parts(linear: nn.Module) -> list[Part]:
    parts = linear.parts() if isinstance(linear, SlicedLinear) else []
    return [(values.detach(), *rest) for values, *rest in parts if rest[0] == "weight"]
