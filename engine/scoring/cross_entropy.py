"""Cross-entropy of tokens straight from hidden states and the output head: the logits of all never stand at once.

With a vocabulary of 128,256 the logits of 2,048 tokens are 1 GB in fp32, and a backward holds them several times.
Here a few hundred rows of them are made, used and dropped. What takes the loss's gradient back to the hidden states is
made in the same pass: a token's loss depends on its own hidden state alone, so its gradient is a vector that the
backward only scales by dL/dloss. The head is thus multiplied as often as with whole logits. A trained head's own
gradient mixes the tokens by dL/dloss, which the forward does not know: there the backward makes the logits anew.

Liger's kernel does a chunk's softmax and gradient in one pass; it is taken where it is installed, on a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..slices.linear import cast_for_autocast

CHUNK = 1 << 26
"""Logits that are made at a time: 256 MB in fp32, 523 rows of a vocabulary of 128,256, enough to fill a GPU."""

FEW = 1 << 22
"""Up to so many logits, 16 MB in fp32, torch's own cross-entropy takes them whole: a chunk would save nothing."""


def token_losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, cap: float | None = None
) -> Tensor:
    """Cross-entropy [L] in float32 (float64 for float64) of `target` int64 [L], in nats.

    hidden [L, H]; weight [V, H] and bias [V] of the output head; every target in [0, V); `cap`: logits are
    cap·tanh(logits/cap) (Gemma-2).
    Differentiable in hidden, weight and bias, once.
    """
    hidden, weight, bias = cast_for_autocast(hidden, weight, bias)
    if len(target) * len(weight) <= FEW:
        logits = _logits(hidden, weight, bias, cap)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target, reduction="none")
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not torch.is_grad_enabled() or not (trained or hidden.requires_grad):
        return _losses_and_pulls(hidden, weight, bias, target, cap, False)[0]
    if trained:
        return _TrainedHead.apply(hidden, weight, bias, target, cap)
    return _FrozenHead.apply(hidden, weight, bias, target, cap)


def loss_path(device: torch.device) -> str:
    """Who computes the loss of a frozen head on `device`: `Liger` or `chunks`."""
    return "Liger" if device.type == "cuda" and importlib.util.find_spec("liger_kernel") else "chunks"


class _FrozenHead(torch.autograd.Function):
    """Keeps dloss/dhidden [L, H] of every token, found while its logits were there."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, cap):
        run = _liger if loss_path(hidden.device) == "Liger" else _losses_and_pulls
        losses, pulls = run(hidden, weight, bias, target, cap, True)
        ctx.save_for_backward(pulls)
        return losses

    @staticmethod
    def backward(ctx, grad):
        (pulls,) = ctx.saved_tensors
        return (pulls * grad[:, None]).to(pulls.dtype), None, None, None, None


class _TrainedHead(torch.autograd.Function):
    """Keeps the hidden states and makes the logits again. Under ZeRO-3 the weight is gathered anew for that."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, cap):
        ctx.save_for_backward(hidden, weight, bias, target)
        ctx.cap = cap
        return _losses_and_pulls(hidden, weight, bias, target, cap, False)[0]

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, bias, target = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wide = torch.promote_types(weight.dtype, torch.float32)
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if wants_weight else None
        d_bias = torch.zeros(bias.shape, dtype=wide, device=weight.device) if wants_bias else None
        for rows in _chunks(len(target), len(weight)):
            pull = _logit_gradient(*_log_probabilities(hidden[rows], weight, bias, ctx.cap), target[rows], ctx.cap)
            pull = pull.mul_(grad[rows, None]).to(weight.dtype)
            if wants_hidden:
                torch.mm(pull, weight, out=d_hidden[rows])
            if wants_weight:
                d_weight += pull.t() @ hidden[rows]
            if wants_bias:
                d_bias += pull.sum(0, dtype=wide)
            del pull  # before the next chunk's logits are made
        d_weight, d_bias = (None if d is None else d.to(weight.dtype) for d in (d_weight, d_bias))
        return d_hidden, d_weight, d_bias, None, None


def _losses_and_pulls(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, cap: float | None, pull: bool
) -> tuple[Tensor, Tensor | None]:
    """The losses [L], and with `pull` dloss/dhidden [L, H]."""
    losses = hidden.new_empty(len(target), dtype=torch.promote_types(hidden.dtype, torch.float32))
    pulls = torch.empty_like(hidden) if pull else None
    for rows in _chunks(len(target), len(weight)):
        losses[rows] = _chunk(hidden[rows], weight, bias, target[rows], cap, pulls[rows] if pull else None)
    return losses, pulls


def _chunk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, cap: float | None, pulls: Tensor | None
) -> Tensor:
    """The losses of one chunk, and dloss/dhidden into `pulls`; a function of its own, so that its logits go with it."""
    logs, capped = _log_probabilities(hidden, weight, bias, cap)
    losses = -logs.gather(1, target[:, None])[:, 0]
    if pulls is not None:
        torch.mm(_logit_gradient(logs, capped, target, cap).to(weight.dtype), weight, out=pulls)
    return losses


def _chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, CHUNK // vocabulary)
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _log_probabilities(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Of a chunk [C, V], in at least float32; and the capped logits, where they are capped."""
    logits = _logits(hidden, weight, bias, cap)
    capped = None if cap is None else logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # half-precision ones go at once
    return torch.log_softmax(logits, -1), capped


def _logit_gradient(logs: Tensor, capped: Tensor | None, target: Tensor, cap: float | None) -> Tensor:
    """dloss/dlogits [C, V] of a chunk, written over its log-probabilities: softmax minus one at the target."""
    gradient = logs.exp_()
    gradient[torch.arange(len(target), device=target.device), target] -= 1
    return gradient if cap is None else gradient.mul_((capped / cap).square_().neg_().add_(1))


def _liger(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, cap: float | None, pull: bool
) -> tuple[Tensor, Tensor | None]:
    """The same by Liger's kernel.

    Its autograd function scales the gradient by one number for all tokens (older releases silently take the
    first of dL/dloss), so what is under it is called: with `reduction="none"` it gives each token's own gradient.
    """
    from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

    hidden = hidden.detach().requires_grad_(pull)
    found = fused_linear_cross_entropy_forward(
        hidden, weight.detach(), target, bias=bias, reduction="none", softcap=cap
    )
    return found[0], found[-3] if pull else None  # its last three are the gradients of hidden, weight and bias
