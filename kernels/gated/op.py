"""The gated activation h = act(c·g)·(c·u), its backward, and everything that scoring wants from the same registers.

    h = gated_forward(gate, up, "silu")                                    # differentiable, works under torch.compile
    out = gated_backward(dh, gate, up, "silu", segments=segments)          # out.dgate, out.dup, out.gate_score, …
    out = gated_backward(dh, gate, up, "silu", inplace=True)               # overwrites gate and up with their gradients

One read of gate, up and dh, one write of their gradients: 10 bytes an element in half precision. In the same pass, on
demand: per-sample sums of |g·dg| and |u·du| (CANEFT Eq. 8 before its division by the tokens), counts of active tokens,
sums of h, compact columns of dgate, dup and h for slice gradients, and h itself. The gain c is LANDeRMT's routing: one
row of `gain` a route, `route` says which row a token takes; c = 1 without it.
"""

import torch
from torch import Tensor

from ..common import outputs
from ..common.activations import check_activation
from ..common.dispatch import runs_now, use_triton
from ..common.fold import Segments, as_tensor
from ..common.outputs import Reduce
from .kernel import launch_backward, launch_forward
from .reference import GatedBackward, backward_torch, forward_torch


# Each op is a plain function that runs now, and the same function behind torch.library for autograd and torch.compile.
def _forward(gate: Tensor, up: Tensor, activation: str, gain: Tensor | None, route: Tensor | None) -> Tensor:
    h = torch.empty_like(gate)
    if gate.numel():
        run = launch_forward if use_triton(gate) else forward_torch
        run(gate, up, activation, gain, route, h)
    return h


_forward_op = torch.library.custom_op("slicetune::gated_forward", _forward, mutates_args=())


@_forward_op.register_fake
def _(gate, up, activation, gain, route):
    return torch.empty_like(gate)


def _run(dh, gate, up, *rest) -> None:
    """Both paths take the same arguments: inputs, then the outputs that they fill."""
    if use_triton(gate) and gate.numel():
        launch_backward(dh, gate, up, *rest)
    else:
        backward_torch(dh, gate, up, *rest)


def _backward(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    gain: Tensor | None,
    route: Tensor | None,
    segments: Tensor | None,
    signed: bool,
    indices: list[Tensor | None],
    emit_h: bool,
) -> list[Tensor]:
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    h, sums, *columns = outputs.empty(gate, segments, indices, emit_h)
    into = h if emit_h else None
    _run(dh, gate, up, activation, gain, route, segments, signed, indices, dgate, dup, into, sums, columns)
    return [dgate, dup, h, sums, *columns]


_backward_op = torch.library.custom_op("slicetune::gated_backward", _backward, mutates_args=())


@_backward_op.register_fake
def _(dh, gate, up, activation, gain, route, segments, signed, indices, emit_h):
    return [torch.empty_like(gate), torch.empty_like(up), *outputs.empty(gate, segments, indices, emit_h)]


# An op with a list of tensors to mutate or to return beside mutated ones cannot be functionalised: sums and columns
# come in allocated, one argument each.
def _backward_inplace(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    sums: Tensor,
    c0: Tensor,
    c1: Tensor,
    activation: str,
    gain: Tensor | None,
    route: Tensor | None,
    segments: Tensor | None,
    signed: bool,
    indices: list[Tensor | None],
    emit_h: bool,
) -> None:
    h = dh if emit_h else None
    _run(dh, gate, up, activation, gain, route, segments, signed, indices, gate, up, h, sums, [c0, c1])


_backward_inplace_op = torch.library.custom_op(
    "slicetune::gated_backward_", _backward_inplace, mutates_args=("dh", "gate", "up", "sums", "c0", "c1")
)


@_backward_inplace_op.register_fake
def _(dh, gate, up, sums, c0, c1, activation, gain, route, segments, signed, indices, emit_h):
    return None


def _save(ctx, inputs, output) -> None:
    gate, up, ctx.activation, gain, route = inputs
    ctx.save_for_backward(gate, up, gain, route)


def _differentiate(ctx, dh: Tensor):
    gate, up, gain, route = ctx.saved_tensors
    none = [None, None, None]
    dgate, dup, *_ = _backward_op(dh.contiguous(), gate, up, ctx.activation, gain, route, None, False, none, False)
    return dgate, dup, None, None, None


_forward_op.register_autograd(_differentiate, setup_context=_save)


def _check(gate: Tensor, up: Tensor, activation: str, *asked: Tensor | None) -> None:
    check_activation(activation)
    assert gate.shape == up.shape, f"gate {tuple(gate.shape)}, up {tuple(up.shape)}: want [T, I]"
    assert gate.dtype == up.dtype, f"gate {gate.dtype}, up {up.dtype}: want one dtype"
    outputs.check(gate, *asked)


def gated_forward(
    gate: Tensor, up: Tensor, activation: str, gain: Tensor | None = None, route: Tensor | None = None
) -> Tensor:
    """h = act(c·gate)·(c·up), and 0 where c = 0; differentiable in gate and up.

    gate, up [T, I], computed in float32 (float64 in float64). `activation`: silu, gelu_tanh or gelu. gain float32
    [routes, I], route int64 [T]: c[t] = gain[route[t]] (row 0 without route; LANDeRMT Eq. 6-8). Returns [T, I] in
    gate's dtype. Raises UserError for an unknown activation.
    """
    _check(gate, up, activation, gain, route)
    run = _forward if runs_now(gate, up, gain, route) else _forward_op
    return run(gate.contiguous(), up.contiguous(), activation, gain, route)


def gated_backward(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    gain: Tensor | None = None,
    route: Tensor | None = None,
    *,
    segments: Tensor | Segments | None = None,
    reduce: Reduce = "mean_abs",
    gate_columns: Tensor | None = None,
    up_columns: Tensor | None = None,
    h_columns: Tensor | None = None,
    emit_h: bool = False,
    inplace: bool = False,
) -> GatedBackward:
    """Gradients of `gated_forward` from dh [T, I], and what scoring and slice gradients want from the same pass.

    segments int32 [S, 2], or Segments where the host knows them: half-open token ranges of the samples, ascending and
    disjoint; tokens outside them get gradients and count nowhere. *_columns int64 [k]: units whose columns of dgate,
    dup or h are wanted compactly.
    The gain gets no gradient here: dL/dc = (g·dg + u·du)/c, from signed scores (`reduce="abs_sum"`).
    `inplace` overwrites gate with dgate, up with dup and, with `emit_h`, dh with h: no memory beyond the sums. All
    three must then be contiguous, and their version counters rise: a second backward through an autograd function
    that had saved them raises instead of reading gradients as activations.
    """
    _check(gate, up, activation, gain, route, segments)
    indices, signed = [gate_columns, up_columns, h_columns], reduce == "abs_sum"
    now = runs_now(dh, gate, up, gain, route, *indices, None if isinstance(segments, Segments) else segments)
    segments = segments if now else as_tensor(segments)
    rest = activation, gain, route, segments, signed, indices, emit_h
    if inplace:
        assert all(x.is_contiguous() for x in (dh, gate, up)), "in place needs contiguous tensors"
        dgate, dup = gate, up
        room = outputs.wanted(gate, segments, indices)
        found = [dh, *(room if now else outputs.as_tensors(gate, room))]
        if now:
            _backward_inplace(dh, gate, up, *found[1:], *rest)
            # torch.library does this for an op: a graph that saved these and runs backward again must raise.
            torch.autograd.graph.increment_version([gate, up, dh] if emit_h else [gate, up])
        else:
            _backward_inplace_op(dh, gate, up, *found[1:], *rest)
    else:
        run = _backward if now else _backward_op
        dgate, dup, *found = run(dh.contiguous(), gate.contiguous(), up.contiguous(), *rest)
    return GatedBackward(dgate, dup, *outputs.asked_for(found, segments, indices, emit_h))
