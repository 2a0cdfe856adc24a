"""The FFN as one function: slices trained, taps scored.

    h = act(x Wgᵀ) · (x Wuᵀ),   y = h Wdᵀ           (gated: Llama, Qwen2.5, Gemma-2)
    h = act(x W1ᵀ + b1),        y = h W2ᵀ + b2      (plain: BLOOM)

It saves x and the pre-activations and recomputes h; matrix products stay with the vendor's library, everything
between them is one pass over memory in `kernels/`. A tap (scoring/passes.py) gets the per-sample sums of activation ×
gradient out of that same pass. Next: ffn.py, which puts it into a model.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.common.dispatch import use_triton
from ...kernels.common.fold import Segments
from ...kernels.common.outputs import buffer_of
from ...kernels.gated.op import gated_backward, gated_forward
from ...kernels.plain.op import plain_backward, plain_forward
from ...kernels.slice_gradient import compact_gradient
from ...kernels.tap import tap as product_sums
from ..common.errors import UserError
from ..common.private import zero3_leaf
from ..models.sites import FFNSite
from .linear import SliceLinear, cast_for_autocast
from .traced import for_compiler, traced
from .written import input_with_gradient


class Tap(Protocol):
    """What a scoring pass hangs into an FFN: which rows belong to which sample, and where the sums go."""

    segments: Segments  # half-open ranges of the flattened tokens, one a sample
    reduce: str  # "mean_abs" | "abs_sum"
    anchor: Tensor  # requires a gradient, so that the first FFN has a backward although its input needs none

    def record(self, layer: int, scores: dict[str, Tensor], unit: Tensor, active: Tensor, activation: Tensor) -> None:
        """Per-sample sums [samples, width] by projection; of h·dh, active counts and sums of h [samples, I]."""


class FusedFFN(nn.Module):
    """Takes a model's FFN's place; keeps its children's names, so checkpoints keep their keys.

    x (..., H) → (..., H). `residual` is BLOOM's way: its FFN adds the residual itself. `recompute` keeps x alone for
    the backward (67 MB instead of 537 MB a layer for 8,192 tokens of Llama-3.1-8B) and computes gate and up again.
    """

    def __init__(self, site: FFNSite, recompute: bool = False) -> None:
        super().__init__()
        self.layer, self.activation, self.roles = site.layer, site.activation, site.projections
        self.tap: Tap | None = None
        self.recompute = recompute
        self.training = site.module.training
        for child in site.projections.values():
            setattr(self, child, getattr(site.module, child))
        self.__dict__["original"] = site.module  # not a child of this module: `plain` gives it back
        zero3_leaf(self)  # it reads its children's weights itself: ZeRO-3 gathers them together with it
        self.register_forward_pre_hook(input_with_gradient)

    def projection(self, role: str) -> nn.Linear | SliceLinear:
        return getattr(self, self.roles[role])

    def plain(self) -> nn.Module:
        """The model's own FFN again, with the trained values."""
        for child in self.roles.values():
            layer = getattr(self, child)
            setattr(self.original, child, layer.plain() if isinstance(layer, SliceLinear) else layer)
        return self.original.train(self.training)

    def linears(self) -> list[nn.Linear | SliceLinear]:
        return [self.projection(role) for role in self.roles]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if torch.compiler.is_compiling() and not self.tap and for_compiler(self):
            y = traced(self, x)
            return y if residual is None else residual + y
        function = _GatedFFN if "gate" in self.roles else _PlainFFN
        slices = [p for linear in self.linears() for p in _slots(linear)]
        y = function.apply(x, self, self.tap.anchor if self.tap else None, *slices)
        return y if residual is None else residual + y


class _GatedFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ffn, anchor, *slices):
        gate, up, down = ffn.linears()
        shape, x2 = x.shape, x.reshape(-1, x.shape[-1])
        x2, *w = operands(x2, gate, up, down)
        g, u = F.linear(x2, w[0], w[1]), F.linear(x2, w[2], w[3])
        y = F.linear(gated_forward(g, u, ffn.activation), w[4], w[5])
        ctx.ffn, ctx.x_dtype, ctx.tap = ffn, x.dtype, ffn.tap
        keep_x = ffn.recompute or _trains(gate, up)
        saved = (None, None) if ffn.recompute else (g, u)
        ctx.save_for_backward(x2 if keep_x else None, *saved, y if ffn.tap else None)
        return y.view(*shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        x, g, u, y = ctx.saved_tensors
        ffn, tap = ctx.ffn, ctx.tap
        gate, up, down = ffn.linears()
        shape, dy = dy.shape, dy.reshape(-1, dy.shape[-1])
        wg, wu, wd = weights(dy.dtype, gate, up, down)
        if g is None:
            g, u = F.linear(x, wg, _bias(gate, dy.dtype)), F.linear(x, wu, _bias(up, dy.dtype))
        segments, reduce = (tap.segments, tap.reduce) if tap else (None, "mean_abs")
        grad = gated_backward(  # writes dgate and dup over g and u; a second backward through them raises
            dy @ wd,
            g,
            u,
            ffn.activation,
            segments=segments,
            reduce=reduce,
            gate_columns=_rows(gate),
            up_columns=_rows(up),
            h_columns=_columns(down),
            emit_h=_rows(down) is not None,
            inplace=True,
        )
        if tap:
            scores = {"gate": grad.gate_score, "up": grad.up_score, "down": product_sums(y, dy, segments, reduce)}
            tap.record(ffn.layer, scores, grad.up_score, grad.active, grad.activation)  # u·du is h·dh
        dx = (grad.dgate @ wg).addmm_(grad.dup, wu).to(ctx.x_dtype) if ctx.needs_input_grad[0] else None
        of_gate, of_up = _row_products(grad.dgate_columns, grad.dup_columns, x)
        slices = (
            *_gradients(gate, grad.dgate, x, dy_columns=grad.dgate_columns, product=of_gate),
            *_gradients(up, grad.dup, x, dy_columns=grad.dup_columns, product=of_up),
            *_gradients(down, dy, grad.h, x_columns=grad.h_columns),
        )
        return None if dx is None else dx.view(*shape[:-1], -1), None, None, *slices


class _PlainFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ffn, anchor, *slices):
        first, second = ffn.linears()
        shape, x2 = x.shape, x.reshape(-1, x.shape[-1])
        x2, *w = operands(x2, first, second)
        a = F.linear(x2, w[0], w[1])
        y = F.linear(plain_forward(a, ffn.activation), w[2], w[3])
        ctx.ffn, ctx.x_dtype, ctx.tap = ffn, x.dtype, ffn.tap
        keep_x = ffn.recompute or _trains(first)
        ctx.save_for_backward(x2 if keep_x else None, None if ffn.recompute else a, y if ffn.tap else None)
        return y.view(*shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        x, a, y = ctx.saved_tensors
        ffn, tap = ctx.ffn, ctx.tap
        first, second = ffn.linears()
        shape, dy = dy.shape, dy.reshape(-1, dy.shape[-1])
        w1, w2 = weights(dy.dtype, first, second)
        if a is None:
            a = F.linear(x, w1, _bias(first, dy.dtype))
        segments, reduce = (tap.segments, tap.reduce) if tap else (None, "mean_abs")
        grad = plain_backward(
            dy @ w2,
            a,
            ffn.activation,
            segments=segments,
            reduce=reduce,
            pre_columns=_rows(first),
            h_columns=_columns(second),
            emit_h=_rows(second) is not None,
        )
        if tap:
            scores = {"in": grad.score, "out": product_sums(y, dy, segments, reduce)}
            tap.record(ffn.layer, scores, grad.unit_score, grad.active, grad.activation)
        dx = (grad.dpre @ w1).to(ctx.x_dtype) if ctx.needs_input_grad[0] else None
        slices = (
            *_gradients(first, grad.dpre, x, dy_columns=grad.dpre_columns),
            *_gradients(second, dy, grad.h, x_columns=grad.h_columns),
        )
        return None if dx is None else dx.view(*shape[:-1], -1), None, None, *slices


def _slots(linear: nn.Linear | SliceLinear) -> tuple:
    if isinstance(linear, SliceLinear):
        return linear.rows, linear.columns, linear.bias_rows
    return None, None, None


def _trains(*linears: nn.Linear | SliceLinear) -> bool:
    return any(isinstance(linear, SliceLinear) for linear in linears)


def operands(x: Tensor, *linears: nn.Linear | SliceLinear) -> tuple[Tensor, ...]:
    """x and each layer's weight and bias, slices written in, in autocast's dtype where that is on."""
    for linear in linears:
        if not isinstance(linear, nn.Linear):
            _before_forward(linear)
    return cast_for_autocast(x, *(t for linear in linears for t in (linear.weight, linear.bias)))


def _before_forward(linear: nn.Module) -> None:
    if not hasattr(linear, "before_forward"):
        kind = f"{type(linear).__module__.partition('.')[0]}'s {type(linear).__name__}"
        raise UserError(f"an attached FFN has {kind} in it, which would be left out: call slices.merge(model) before")
    linear.before_forward()


def weights(dtype: torch.dtype, *linears: nn.Linear | SliceLinear) -> list[Tensor]:
    """The weights for the backward; where they were gathered anew the slices are written in again."""
    for linear in linears:
        if not isinstance(linear, nn.Linear):
            linear.before_backward()
    return [linear.weight.to(dtype) for linear in linears]


def _row_products(gate: Tensor | None, up: Tensor | None, x: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The slice gradients of gate and up from their columns, which lie side by side: one product, which reads x once.

    Each float32 [k, in]; None where not both are trained, and where no kernel runs: nothing is gained there.
    """
    if gate is None or up is None or not use_triton(gate):
        return None, None
    k = gate.shape[1]
    product = compact_gradient(buffer_of(gate), x)
    return product[:k], product[k : k + up.shape[1]]


def _bias(linear: nn.Linear | SliceLinear, dtype: torch.dtype) -> Tensor | None:
    return None if linear.bias is None else linear.bias.to(dtype)


def _rows(linear: nn.Linear | SliceLinear) -> Tensor | None:
    return linear.row_index if isinstance(linear, SliceLinear) else None


def _columns(linear: nn.Linear | SliceLinear) -> Tensor | None:
    return linear.column_index if isinstance(linear, SliceLinear) else None


def _gradients(linear: nn.Linear | SliceLinear, dy: Tensor, x: Tensor | None, **emitted: Tensor | None) -> tuple:
    return linear.gradients(dy, x, **emitted) if isinstance(linear, SliceLinear) else (None, None, None)
