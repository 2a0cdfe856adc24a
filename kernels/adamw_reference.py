"""AdamW over compact slices in plain torch: the formula, the 8-bit block-wise moments and the stochastic rounding.

The Triton kernel in `adamw.py` computes the same, operation by operation; this file runs on the CPU and in the tests.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256  # elements that share one absolute maximum in 8-bit moments
M_TOP, V_TOP = 127, 255  # largest codes: exp_avg is signed, exp_avg_sq is not
_MASK = 0xFFFFFFFF


@dataclass
class Slice:
    """One parameter's part in a step: `param` is what the model holds, `master` its float32 values if that is lower.

    param, grad, exp_avg, exp_avg_sq, master: one shape, contiguous, one device. 8-bit moments: exp_avg is int8,
    exp_avg_sq uint8, and the absmax tensors are float32 [ceil(numel / 256)]. weight, index, axis: where the new values
    go as well, row (axis 0) or column (axis 1) index[i] of weight for param[i]; index has no duplicates.
    step counts from 1. key: 64 random bits for stochastic rounding, the same on every rank (`rounding_key`).
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    master: Tensor | None = None
    exp_avg_absmax: Tensor | None = None
    exp_avg_sq_absmax: Tensor | None = None
    weight: Tensor | None = None
    index: Tensor | None = None
    axis: int = 0
    key: int = 0

    @property
    def step_size(self) -> float:
        return self.lr / (1 - self.beta1**self.step)

    @property
    def correction(self) -> float:
        """Square root of the second moment's bias correction."""
        return (1 - self.beta2**self.step) ** 0.5

    @property
    def values_dtype(self) -> torch.dtype:
        """What the update is computed in: float64 for float64 parameters, else float32."""
        return torch.float64 if self.param.dtype == torch.float64 else torch.float32

    @property
    def rounds(self) -> bool:
        """Whether new values are rounded at random: a bfloat16 parameter without a master."""
        return self.master is None and self.param.dtype == torch.bfloat16


def adamw_reference(slices: list[Slice], grad_scale: Tensor | None = None) -> None:
    """One step over all slices, in place. grad_scale: one-element tensor that multiplies every gradient.

    One slice at a time: it stays in a CPU's cache from one operation to the next, where torch's foreach operations
    sweep over all of them for each (measured: half the time).
    """
    for s in slices:
        grad = s.grad.to(s.values_dtype)
        if grad_scale is not None:
            grad = grad * grad_scale.reshape(()).to(s.values_dtype)
        _step(s, grad)


def _step(s: Slice, grad: Tensor) -> None:
    """The formula of torch.optim.AdamW in its order of operations, so that float32 results have the same bits."""
    value = s.master if s.master is not None else s.param.to(s.values_dtype)
    mean, square = read_moments(s)
    if s.weight_decay != 0:
        value.mul_(1 - s.lr * s.weight_decay)
    mean.lerp_(grad, 1 - s.beta1)
    square.mul_(s.beta2).addcmul_(grad, grad, value=1 - s.beta2)
    denominator = (square.sqrt() / s.correction).add_(s.eps)
    value.addcdiv_(mean, denominator, value=-s.step_size)
    write_moments(s, mean, square)
    write_values(s, value)


def write_values(s: Slice, values: Tensor) -> None:
    """Put new values into the parameter (rounded as it asks) and from there into the weight it is a slice of."""
    if s.rounds:
        s.param.copy_(stochastic_round(values, random_bits(values.numel(), s.key, values.device)))
    elif values.data_ptr() != s.param.data_ptr():
        s.param.copy_(values)
    if s.weight is not None:
        scatter(s.param, s.weight, s.index, s.axis)


def scatter(param: Tensor, weight: Tensor, index: Tensor, axis: int) -> None:
    """weight[index[i]] = param[i] (axis 0) or weight[:, index[i]] = param[i] (axis 1), rounded to the weight's type."""
    values = param if axis == 0 else param.t()
    weight.index_copy_(axis, index, values.to(weight.dtype))


# Stochastic rounding: 32 bits for each element from its position and a 64-bit key, so every rank draws the same.


def mix(x: int | Tensor) -> int | Tensor:
    """A bijection of 32-bit integers in which every input bit moves every output bit ("lowbias32" of C. Wellons)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)


def rounding_key(seed: int, ordinal: int, step: int) -> int:
    """64 bits for parameter number `ordinal` at `step`, the same on every rank and in every rerun."""
    low = mix(mix(mix(seed & _MASK) + ordinal & _MASK) + step & _MASK)
    return low | mix(low + 0x9E3779B9 & _MASK) << 32


def random_bits(count: int, key: int, device: torch.device | str = "cpu") -> Tensor:
    """32 bits for each of `count` elements as int64: mix(mix(position ^ key_low) + key_high)."""
    position = torch.arange(count, device=device)
    return mix(mix(position ^ (key & _MASK)) + (key >> 32) & _MASK)


def stochastic_round(values: Tensor, bits: Tensor) -> Tensor:
    """float32 → bfloat16, up with the probability that makes the mean exact; 16 low bits of `bits` decide.

    Infinite and NaN values stay what they are.
    """
    raw = values.contiguous().view(torch.int32).to(torch.int64).view(-1)
    # Adding below the kept half carries into it exactly as often as the dropped half is large.
    rounded = ((raw + (bits & 0xFFFF)) >> 16).to(torch.int16).view(torch.bfloat16).view(values.shape)
    return torch.where(values.isfinite(), rounded, values.to(torch.bfloat16))


# 8-bit moments: a block of 256 elements shares its absolute maximum A. exp_avg is ±A (code / 127)², exp_avg_sq is
# A (code / 255)⁴: fine near zero, where most values are, and coarse near A. Rounding between the two neighbouring codes
# is random and unbiased: to the nearest, a decay of 0.1 % a step is below half a code and would never happen.


def read_moments(s: Slice) -> tuple[Tensor, Tensor]:
    """exp_avg and exp_avg_sq as float32 (or float64); the tensors themselves when they are not 8-bit."""
    if s.exp_avg_absmax is None:
        return s.exp_avg, s.exp_avg_sq
    code = s.exp_avg.float()
    mean = code * code.abs() * (1 / M_TOP**2) * _spread(s.exp_avg_absmax, code)
    code = s.exp_avg_sq.float()
    square = (code * code) * (code * code) * (1 / V_TOP**4) * _spread(s.exp_avg_sq_absmax, code)
    return mean, square


def write_moments(s: Slice, mean: Tensor, square: Tensor) -> None:
    """Store 8-bit moments; nothing to do for others, which were updated in place."""
    if s.exp_avg_absmax is None:
        return
    # The parameter's own rounding uses the bits themselves: here they are mixed once more.
    bits = mix(random_bits(mean.numel(), s.key, mean.device) + 0x9E3779B9 & _MASK).view(mean.shape)
    s.exp_avg_absmax.copy_(_absmax(mean))
    s.exp_avg_sq_absmax.copy_(_absmax(square))
    x = _ratio(mean.abs(), s.exp_avg_absmax) * M_TOP**2
    low = x.sqrt().floor()
    up = x - low * low > _uniform(bits) * (2 * low + 1)
    s.exp_avg.copy_((low + up).clamp_(max=M_TOP) * mean.sign())
    x = _ratio(square, s.exp_avg_sq_absmax) * float(V_TOP**4)
    low = x.sqrt().sqrt().floor()
    below, above = (low * low) * (low * low), ((low + 1) * (low + 1)) * ((low + 1) * (low + 1))
    up = x - below > _uniform(bits >> 16) * (above - below)
    # A second moment of zero would divide its update by eps alone, so a positive one keeps at least the first code.
    s.exp_avg_sq.copy_(torch.maximum((low + up).clamp_(max=V_TOP), (square > 0).float()))


def _uniform(bits: Tensor) -> Tensor:
    return (bits & 0xFFFF).float() * (1 / 65536)


def _absmax(x: Tensor) -> Tensor:
    flat = x.abs().view(-1)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK))
    return flat.view(-1, BLOCK).amax(1)


def _spread(absmax: Tensor, like: Tensor) -> Tensor:
    return absmax.repeat_interleave(BLOCK)[: like.numel()].view(like.shape)


def _ratio(x: Tensor, absmax: Tensor) -> Tensor:
    return x / torch.where(absmax > 0, absmax, 1.0).repeat_interleave(BLOCK)[: x.numel()].view(x.shape)
