"""The plain activation h = act(c·pre + bias) of BLOOM's FFN, its backward, and the scores from the same registers.

    h = plain_forward(pre, "gelu_tanh", bias)                              # pre = x Wᵀ without its bias; differentiable
    out = plain_backward(dh, pre, "gelu_tanh", bias, segments=segments)    # out.dpre, out.score, …

The gain c scales the projection and not its bias (LANDeRMT Eq. 7: act(c·(xW) + b)), and h = 0 where c = 0: a unit that
takes no part must not leak act(b).
"""

import torch
from torch import Tensor

from ..common import outputs
from ..common.activations import check_activation
from ..common.dispatch import runs_now, use_triton
from ..common.fold import Segments, as_tensor
from ..common.outputs import Reduce
from .kernel import launch_backward, launch_forward
from .reference import PlainBackward, backward_torch, forward_torch


def _forward(pre: Tensor, activation: str, bias: Tensor | None, gain: Tensor | None, route: Tensor | None) -> Tensor:
    h = torch.empty_like(pre)
    if pre.numel():
        run = launch_forward if use_triton(pre) else forward_torch
        run(pre, activation, bias, gain, route, h)
    return h


_forward_op = torch.library.custom_op("slicetune::plain_forward", _forward, mutates_args=())


@_forward_op.register_fake
def _(pre, activation, bias, gain, route):
    return torch.empty_like(pre)


def _backward(
    dh: Tensor,
    pre: Tensor,
    activation: str,
    bias: Tensor | None,
    gain: Tensor | None,
    route: Tensor | None,
    segments: Tensor | None,
    signed: bool,
    indices: list[Tensor | None],
    emit_h: bool,
) -> list[Tensor]:
    dpre = torch.empty_like(pre)
    h, sums, *columns = outputs.empty(pre, segments, indices, emit_h)
    into = h if emit_h else None
    run = launch_backward if use_triton(pre) and pre.numel() else backward_torch
    run(dh, pre, activation, bias, gain, route, segments, signed, indices, dpre, into, sums, columns)
    return [dpre, h, sums, *columns]


_backward_op = torch.library.custom_op("slicetune::plain_backward", _backward, mutates_args=())


@_backward_op.register_fake
def _(dh, pre, activation, bias, gain, route, segments, signed, indices, emit_h):
    return [torch.empty_like(pre), *outputs.empty(pre, segments, indices, emit_h)]


def _save(ctx, inputs, output) -> None:
    pre, ctx.activation, bias, gain, route = inputs
    ctx.save_for_backward(pre, bias, gain, route)


def _differentiate(ctx, dh: Tensor):
    pre, bias, gain, route = ctx.saved_tensors
    none = [None, None]
    dpre, *_ = _backward_op(dh.contiguous(), pre, ctx.activation, bias, gain, route, None, False, none, False)
    return dpre, None, None, None, None


_forward_op.register_autograd(_differentiate, setup_context=_save)


def _check(pre: Tensor, activation: str, bias: Tensor | None, *asked: Tensor | None) -> None:
    check_activation(activation)
    outputs.check(pre, *asked)
    if bias is not None:
        assert bias.shape == pre.shape[1:], f"bias {tuple(bias.shape)}: want [I]"
        assert not bias.requires_grad, "bias has no gradient here: it is the column sums of dpre ÷ c"


def plain_forward(
    pre: Tensor,
    activation: str,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    route: Tensor | None = None,
) -> Tensor:
    """h = act(c·pre + bias), and 0 where c = 0; differentiable in pre.

    pre [T, I] without its bias, bias [I] any float dtype, computed in float32 (float64 in float64); gain and route as
    in `gated_forward`. Returns [T, I] in pre's dtype. Raises UserError for an unknown activation.
    """
    _check(pre, activation, bias, gain, route)
    run = _forward if runs_now(pre, bias, gain, route) else _forward_op
    return run(pre.contiguous(), activation, bias, gain, route)


def plain_backward(
    dh: Tensor,
    pre: Tensor,
    activation: str,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    route: Tensor | None = None,
    *,
    segments: Tensor | Segments | None = None,
    reduce: Reduce = "mean_abs",
    pre_columns: Tensor | None = None,
    h_columns: Tensor | None = None,
    emit_h: bool = False,
) -> PlainBackward:
    """The gradient of `plain_forward` from dh [T, I], and what scoring and slice gradients want from the same pass.

    segments int32 [S, 2], or Segments where the host knows them: half-open token ranges of the samples, ascending and
    disjoint; tokens outside them get gradients and count nowhere. *_columns int64 [k]: units whose columns of dpre or
    h are wanted compactly.
    """
    _check(pre, activation, bias, gain, route, segments)
    indices = [pre_columns, h_columns]
    now = runs_now(dh, pre, bias, gain, route, *indices, None if isinstance(segments, Segments) else segments)
    segments = segments if now else as_tensor(segments)
    asked = segments, reduce == "abs_sum", indices, emit_h
    run = _backward if now else _backward_op
    dpre, *found = run(dh.contiguous(), pre.contiguous(), activation, bias, gain, route, *asked)
    return PlainBackward(dpre, *outputs.asked_for(found, segments, indices, emit_h))
