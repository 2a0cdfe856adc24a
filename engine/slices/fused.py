"""The FFN as one function: slices trained, taps scored.

    h = act(x Wgᵀ) · (x Wuᵀ),   y = h Wdᵀ           (gated: Llama, Qwen2.5, Gemma-2)
    h = act(x W1ᵀ + b1),        y = h W2ᵀ + b2      (plain: BLOOM, GPT-NeoX)

Gate and up may lie in one layer, one's rows behind the other's (Phi-3, GLM-4): its weight is read as two.

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
from ...kernels.gated.reference import GatedBackward
from ...kernels.plain.op import plain_backward, plain_forward
from ...kernels.slice_gradient import compact_gradient
from ...kernels.tap import tap as product_sums
from ..common.errors import UserError
from ..common.private import unviewed, zero3_leaf
from ..models.sites import FFNSite
from .frozen.products import dense, product, pull, quantised_layer
from .linear import SliceLinear, autocast_dtype, cast_for_autocast
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
        self.recompute, self.packed = recompute, site.packed
        self.gate_rows = 0
        """Of a packed layer's trained rows, how many are gate's; they come first."""
        self.training = site.module.training
        for child in dict.fromkeys(site.projections.values()):
            setattr(self, child, getattr(site.module, child))
        self.__dict__["original"] = site.module  # not a child of this module: `plain` gives it back
        zero3_leaf(self)  # it reads its children's weights itself: ZeRO-3 gathers them together with it
        self.register_forward_pre_hook(input_with_gradient)

    def projection(self, role: str) -> nn.Linear | SliceLinear:
        return getattr(self, self.roles[role])

    def plain(self) -> nn.Module:
        """The model's own FFN again, with the trained values."""
        for child in dict.fromkeys(self.roles.values()):
            layer = getattr(self, child)
            setattr(self.original, child, layer.plain() if isinstance(layer, SliceLinear) else layer)
        return self.original.train(self.training)

    def linears(self) -> list[nn.Linear | SliceLinear]:
        """Its layers, each once, the last one last."""
        return [getattr(self, child) for child in dict.fromkeys(self.roles.values())]

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """As nn.Module's. A block may add to what it gives in place (Falcon), which ZeRO-3's backward hook forbids."""
        out = super().__call__(*args, **kwargs)
        return unviewed(out, out.shape) if self._backward_hooks else out

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
        *first, down = ffn.linears()
        shape = x.shape
        x2, dtype = begin(x.reshape(-1, x.shape[-1]), *first, down)
        g, u = _gate_and_up(ffn, x2, first, dtype)
        y = product(gated_forward(g, u, ffn.activation), down, _bias(down, dtype), dtype)
        ctx.ffn, ctx.x_dtype, ctx.tap = ffn, x.dtype, ffn.tap
        keep_x = ffn.recompute or _trains(*first)
        saved = (None, None) if ffn.recompute else (g, u)
        ctx.save_for_backward(x2 if keep_x else None, *saved, y if ffn.tap else None)
        return _given_out(y, shape, ffn.tap)

    @staticmethod
    def backward(ctx, dy):
        x, g, u, y = ctx.saved_tensors
        ffn, tap = ctx.ffn, ctx.tap
        *first, down = ffn.linears()
        shape, dy = dy.shape, dy.reshape(-1, dy.shape[-1])
        resume(*first, down)
        if g is None:
            g, u = _gate_and_up(ffn, x, first, dy.dtype)
        segments, reduce = (tap.segments, tap.reduce) if tap else (None, "mean_abs")
        gate_rows, up_rows = _trained_rows(ffn, *first)
        grad = gated_backward(  # writes dgate and dup over g and u; a second backward through them raises
            pull(dy, down),
            g,
            u,
            ffn.activation,
            segments=segments,
            reduce=reduce,
            gate_columns=gate_rows,
            up_columns=up_rows,
            h_columns=_columns(down),
            emit_h=_rows(down) is not None,
            inplace=True,
        )
        if tap:
            scores = {"gate": grad.gate_score, "up": grad.up_score, "down": product_sums(y, dy, segments, reduce)}
            tap.record(ffn.layer, scores, grad.up_score, grad.active, grad.activation)  # u·du is h·dh
        dx = _pull_both(ffn, grad, first).to(ctx.x_dtype) if ctx.needs_input_grad[0] else None
        slices = (*_first_gradients(ffn, first, grad, x), *_gradients(down, dy, grad.h, x_columns=grad.h_columns))
        return None if dx is None else dx.view(*shape[:-1], -1), None, None, *slices


class _PlainFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ffn, anchor, *slices):
        first, second = ffn.linears()
        shape = x.shape
        x2, dtype = begin(x.reshape(-1, x.shape[-1]), first, second)
        a = product(x2, first, _bias(first, dtype), dtype)
        y = product(plain_forward(a, ffn.activation), second, _bias(second, dtype), dtype)
        ctx.ffn, ctx.x_dtype, ctx.tap = ffn, x.dtype, ffn.tap
        keep_x = ffn.recompute or _trains(first)
        ctx.save_for_backward(x2 if keep_x else None, None if ffn.recompute else a, y if ffn.tap else None)
        return _given_out(y, shape, ffn.tap)

    @staticmethod
    def backward(ctx, dy):
        x, a, y = ctx.saved_tensors
        ffn, tap = ctx.ffn, ctx.tap
        first, second = ffn.linears()
        shape, dy = dy.shape, dy.reshape(-1, dy.shape[-1])
        resume(first, second)
        if a is None:
            a = product(x, first, _bias(first, dy.dtype), dy.dtype)
        segments, reduce = (tap.segments, tap.reduce) if tap else (None, "mean_abs")
        grad = plain_backward(
            pull(dy, second),
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
        dx = pull(grad.dpre, first).to(ctx.x_dtype) if ctx.needs_input_grad[0] else None
        slices = (
            *_gradients(first, grad.dpre, x, dy_columns=grad.dpre_columns),
            *_gradients(second, dy, grad.h, x_columns=grad.h_columns),
        )
        return None if dx is None else dx.view(*shape[:-1], -1), None, None, *slices


def _given_out(y: Tensor, shape: torch.Size, tap: Tap | None) -> Tensor:
    """y as the model gets it, which may add to it in place (Falcon does). A tap keeps y, so that is another one."""
    return unviewed(y if tap is None else y.clone(), (*shape[:-1], y.shape[-1]))


def _slots(linear: nn.Linear | SliceLinear) -> tuple:
    if isinstance(linear, SliceLinear):
        return linear.rows, linear.columns, linear.bias_rows
    return None, None, None


def _trains(*linears: nn.Linear | SliceLinear) -> bool:
    return any(isinstance(linear, SliceLinear) for linear in linears)


def begin(x: Tensor, *linears: nn.Linear | SliceLinear) -> tuple[Tensor, torch.dtype | None]:
    """Slices written in; x in autocast's dtype where that is on, and that dtype."""
    for linear in linears:
        if not isinstance(linear, nn.Linear):
            _before_forward(linear)
    return *cast_for_autocast(x), autocast_dtype(x)


def _before_forward(linear: nn.Module) -> None:
    if not hasattr(linear, "before_forward"):
        kind = f"{type(linear).__module__.partition('.')[0]}'s {type(linear).__name__}"
        raise UserError(f"an attached FFN has {kind} in it, which would be left out: call slices.merge(model) before")
    linear.before_forward()


def resume(*linears: nn.Linear | SliceLinear) -> None:
    """Before the backward: where the weights were gathered anew the slices are written in again."""
    for linear in linears:
        if not isinstance(linear, nn.Linear):
            linear.before_backward()


def _gate_and_up(
    ffn: FusedFFN, x: Tensor, first: list[nn.Linear | SliceLinear], dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """The pre-activations [T, I]; `dtype` as of products.product."""
    if not ffn.packed:
        g, u = (product(x, linear, _bias(linear, dtype), dtype) for linear in first)
        return g, u
    layer = quantised_layer(first[0])
    weight, bias = dense(first[0], dtype if layer is None else x.dtype), _bias(first[0], dtype)
    g, u = map(F.linear, (x, x), weight.chunk(2), (None, None) if bias is None else bias.chunk(2))
    return g, u


def _pull_both(ffn: FusedFFN, grad: GatedBackward, first: list[nn.Linear | SliceLinear]) -> Tensor:
    """dx of gate and up together [T, H]."""
    if not ffn.packed:
        gate, up = first
        return pull(grad.dup, up, pull(grad.dgate, gate))
    gate, up = dense(first[0], grad.dgate.dtype).chunk(2)
    return (grad.dgate @ gate).addmm_(grad.dup, up)


def _trained_rows(ffn: FusedFFN, *first: nn.Linear | SliceLinear) -> tuple[Tensor | None, Tensor | None]:
    """The trained rows of gate and of up, numbered in each; None where it has none."""
    if not ffn.packed:
        return _rows(first[0]), _rows(first[1])
    index, units = _rows(first[0]), first[0].out_features // 2
    if index is None:
        return None, None
    gate, up = index[: ffn.gate_rows], index[ffn.gate_rows :] - units
    return gate if len(gate) else None, up if len(up) else None


def _first_gradients(
    ffn: FusedFFN, first: list[nn.Linear | SliceLinear], grad: GatedBackward, x: Tensor | None
) -> list:
    """The slice gradients of gate and up, or of the one layer that both lie in."""
    gate, up = grad.dgate_columns, grad.dup_columns
    product = _product(gate, up, x)
    if ffn.packed:
        there = [own for own in (gate, up) if own is not None]
        if not there:
            return [None, None, None]
        return [*_gradients(first[0], grad.dgate, x, dy_columns=torch.cat(there, 1), product=product)]
    of_gate, of_up = (None, None) if product is None else product.split([gate.shape[1], up.shape[1]])
    found = _gradients(first[0], grad.dgate, x, dy_columns=gate, product=of_gate)
    return [*found, *_gradients(first[1], grad.dup, x, dy_columns=up, product=of_up)]


def _product(gate: Tensor | None, up: Tensor | None, x: Tensor | None) -> Tensor | None:
    """The slice gradients of gate and then up from their columns, which lie side by side: one product reads x once.

    float32 [k, in]; None where not both are trained, and where no kernel runs: nothing is gained there.
    """
    if gate is None or up is None or not use_triton(gate):
        return None
    return compact_gradient(buffer_of(gate), x)[: gate.shape[1] + up.shape[1]]


def _bias(linear: nn.Linear | SliceLinear, dtype: torch.dtype | None) -> Tensor | None:
    return linear.bias if linear.bias is None or dtype is None else linear.bias.to(dtype)


def _rows(linear: nn.Linear | SliceLinear) -> Tensor | None:
    return linear.row_index if isinstance(linear, SliceLinear) else None


def _columns(linear: nn.Linear | SliceLinear) -> Tensor | None:
    return linear.column_index if isinstance(linear, SliceLinear) else None


def _gradients(linear: nn.Linear | SliceLinear, dy: Tensor, x: Tensor | None, **emitted: Tensor | None) -> tuple:
    return linear.gradients(dy, x, **emitted) if isinstance(linear, SliceLinear) else (None, None, None)
