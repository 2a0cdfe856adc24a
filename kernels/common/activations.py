"""The activations of gated and plain FFNs with their slopes: plain torch and Triton, formula beside formula.

silu        x·σ(x)                           Llama, Qwen2.5, Baichuan2
gelu_tanh   x·σ(2√(2/π)(x + 0.044715x³))     Gemma-2, BLOOM: 0.5x(1 + tanh z) = x·σ(2z)
gelu        x·Φ(x)                           erf form: GPT-NeoX, Falcon
relu        max(x, 0)                        its slope at 0 is 0, as torch's
relu2       max(x, 0)²                       Nemotron, Arcee

tanh is written through the sigmoid because libdevice's is missing in the interpreter and slower on a GPU.

On NVIDIA's parts the sigmoid is two approximate instructions with a multiplication and an addition, where the general
form checks the ranges of the exponential and of the division: a third of all instructions of the forward kernel. Both
have the same error, which is that of the exponential (tests/kernels/test_activations.py).
"""

import math

import torch
from torch import Tensor

from .dispatch import jit, tl
from .errors import UserError

ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu", "relu2")


def check_activation(activation: str) -> None:
    """Raises UserError for an activation that the kernels do not know."""
    if activation not in ACTIVATIONS:
        raise UserError(f"activation {activation!r}: the kernels know {' '.join(ACTIVATIONS)}")


def value(x: Tensor, activation: str) -> Tensor:
    """act(x), same shape and dtype; float32 or float64."""
    if activation == "silu":
        return x * torch.sigmoid(x)
    if activation == "gelu_tanh":
        return x * torch.sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * x * x))
    if activation == "relu":
        return x.relu()
    if activation == "relu2":
        return x.relu().square()
    check_activation(activation)
    return x * (0.5 * (1 + torch.erf(x * math.sqrt(0.5))))


def value_and_slope(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """act(x) and act'(x), same shape and dtype; float32 or float64."""
    if activation == "silu":
        share = torch.sigmoid(x)
        act = x * share
        return act, share + act * (1 - share)
    if activation == "gelu_tanh":
        square = x * x
        share = torch.sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * square))
        act = x * share
        return act, share + act * (1 - share) * (1.5957691216057308 + 0.21406444881780076 * square)
    if activation == "relu":
        return x.relu(), (x > 0).to(x.dtype)
    if activation == "relu2":
        positive = x.relu()
        return positive.square(), 2 * positive
    check_activation(activation)
    share = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    return x * share, share + x * torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))


def fused_value(x: Tensor, activation: str, out: Tensor) -> Tensor:
    """`value` into `out` by torch's own kernel, one pass over memory: what the CPU path runs. `out` may be x."""
    if activation == "silu":
        return torch.ops.aten.silu.out(x, out=out)
    if activation in ("relu", "relu2"):
        torch.clamp_min(x, 0, out=out)
        return out.square_() if activation == "relu2" else out
    return torch.ops.aten.gelu.out(x, approximate="tanh" if activation == "gelu_tanh" else "none", out=out)


def fused_pull(grad: Tensor, x: Tensor, activation: str, out: Tensor) -> Tensor:
    """grad · act'(x) into `out` by torch's own kernel. `out` may be grad or x."""
    if activation == "silu":
        return torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=out)
    if activation == "relu":
        return torch.ops.aten.threshold_backward.grad_input(grad, x, 0, grad_input=out)
    if activation == "relu2":
        return torch.mul(grad, x.relu().mul_(2), out=out)
    tanh = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward.grad_input(grad, x, approximate=tanh, grad_input=out)


@jit
def _approximate(x, INSTRUCTION: tl.constexpr):
    """One instruction of PTX on every element of a float32 block."""
    return tl.inline_asm_elementwise(INSTRUCTION, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@jit
def sigmoid(x, FAST: tl.constexpr):
    """σ(x) of a float32 block; infinite x gives 0 and 1. FAST: on parts that run PTX."""
    if FAST:
        return _from_power(x * -1.4426950408889634)
    else:
        return tl.sigmoid(x)


@jit
def _from_power(t):
    """1 / (1 + 2^t)."""
    return _approximate(1.0 + _approximate(t, "ex2.approx.ftz.f32 $0, $1;"), "rcp.approx.ftz.f32 $0, $1;")


@jit
def tanh_share(x, square, FAST: tl.constexpr):
    """σ(2√(2/π)(x + 0.044715x³)), the tanh form of GELU over x; FAST has log2 e in its constants."""
    if FAST:
        return _from_power(x * (-2.302208198144325 - 0.1029432395800235 * square))
    else:
        return tl.sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * square))


@jit
def triton_value(x, ACTIVATION: tl.constexpr, FAST: tl.constexpr):
    """`value` on a float32 block."""
    if ACTIVATION == "silu":
        share = sigmoid(x, FAST)
    elif ACTIVATION == "gelu_tanh":
        share = tanh_share(x, x * x, FAST)
    elif ACTIVATION == "relu":
        share = tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == "relu2":
        share = tl.maximum(x, 0.0)
    else:
        share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    return x * share


@jit
def triton_value_and_slope(x, ACTIVATION: tl.constexpr, FAST: tl.constexpr):
    """`value_and_slope` on a float32 block."""
    if ACTIVATION == "silu":
        share = sigmoid(x, FAST)
        slope = share + x * share * (1 - share)
    elif ACTIVATION == "gelu_tanh":
        square = x * x
        share = tanh_share(x, square, FAST)
        slope = share + x * share * (1 - share) * (1.5957691216057308 + 0.21406444881780076 * square)
    elif ACTIVATION == "relu":
        share = tl.where(x > 0, 1.0, 0.0)
        slope = share
    elif ACTIVATION == "relu2":
        share = tl.maximum(x, 0.0)
        slope = 2 * share
    else:
        share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        slope = share + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    return x * share, slope
