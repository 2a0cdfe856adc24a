"""AdamW over compact slices in plain torch: the formula, the 8-bit block-wise moments and the stochastic rounding.

The Triton kernel in `kernel.py` computes the same, operation by operation; this file runs on the CPU and in the tests.
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
    sweep over all of them for each (measured: half the time). torch's fused kernel takes a third of it, but its last
    bits are not those of torch.optim.AdamW by itself.
    """
    most = max((s.param.numel() for s in slices), default=0)
    scratch = {s.values_dtype: s.param.new_empty(most, dtype=s.values_dtype) for s in slices}
    for s in slices:
        grad = s.grad.to(s.values_dtype)
        if grad_scale is not None:
            grad = grad * grad_scale.reshape(()).to(s.values_dtype)
        _step(s, grad, scratch[s.values_dtype][: grad.numel()].view(grad.shape))


def _step(s: Slice, grad: Tensor, denominator: Tensor) -> None:
    """The formula of torch.optim.AdamW in its order of operations, so that float32 results have the same bits."""
    value = s.master if s.master is not None else s.param.to(s.values_dtype)
    mean, square = read_moments(s)
    if s.weight_decay != 0:
        value.mul_(1 - s.lr * s.weight_decay)
    mean.lerp_(grad, 1 - s.beta1)
    square.mul_(s.beta2).addcmul_(grad, grad, value=1 - s.beta2)
    torch.sqrt(square, out=denominator).div_(s.correction).add_(s.eps)
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


def mix(x: int) -> int:
    """A bijection of 32-bit integers in which every input bit moves every output bit ("lowbias32" of C. Wellons)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)


def mix_(x: Tensor) -> Tensor:
    """`mix` of an int32 tensor, in place: products wrap, and the masks undo the sign that a shift draws in."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_signed(0x846CA68B))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _signed(x: int) -> int:
    """The low 32 bits of x as an int32."""
    return (x & _MASK ^ 1 << 31) - (1 << 31)


def rounding_key(seed: int, ordinal: int, step: int) -> int:
    """64 bits for parameter number `ordinal` at `step`, the same on every rank and in every rerun."""
    low = mix(mix(mix(seed & _MASK) + ordinal & _MASK) + step & _MASK)
    return low | mix(low + 0x9E3779B9 & _MASK) << 32


def random_bits(count: int, key: int, device: torch.device | str = "cpu") -> Tensor:
    """32 bits for each of `count` elements as int32: mix(mix(position ^ key_low) + key_high)."""
    position = torch.arange(count, dtype=torch.int32, device=device)
    return mix_(mix_(position.bitwise_xor_(_signed(key))).add_(_signed(key >> 32)))


def stochastic_round(values: Tensor, bits: Tensor) -> Tensor:
    """float32 → bfloat16, up with the probability that makes the mean exact; 16 low bits of `bits` decide.

    Infinite and NaN values stay what they are.
    """
    raw = values.contiguous().view(torch.int32).view(-1)
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
    code = _blocks(s.exp_avg).float()
    mean = (code * code.abs()).mul_(1 / M_TOP**2).mul_(s.exp_avg_absmax[:, None])
    code = _blocks(s.exp_avg_sq).float()
    square = code.mul_(code).mul_(code).mul_(1 / V_TOP**4).mul_(s.exp_avg_sq_absmax[:, None])
    return tuple(x.view(-1)[: s.param.numel()].view(s.param.shape) for x in (mean, square))


def write_moments(s: Slice, mean: Tensor, square: Tensor) -> None:
    """Store 8-bit moments; nothing to do for others, which were updated in place."""
    if s.exp_avg_absmax is None:
        return
    mean, square = _blocks(mean), _blocks(square)
    # The parameter's own rounding uses the bits themselves: here they are mixed once more.
    bits = mix_(random_bits(mean.numel(), s.key, mean.device).add_(_signed(0x9E3779B9))).view(mean.shape)
    x = _ratio(mean.abs(), s.exp_avg_absmax).mul_(M_TOP**2)
    low = x.sqrt().floor_()
    x.sub_(low * low)
    up = torch.gt(x, (low * 2).add_(1).mul_(_uniform(bits)), out=x)
    _store(s.exp_avg, low.add_(up).clamp_(max=M_TOP).mul_(mean.sign()))
    x = _ratio(square, s.exp_avg_sq_absmax).mul_(float(V_TOP**4))
    low = x.sqrt().sqrt_().floor_()
    below, above = (low * low).square_(), (low + 1).square_().square_()
    up = torch.gt(x.sub_(below), above.sub_(below).mul_(_uniform(bits >> 16)), out=x)
    # A second moment of zero would divide its update by eps alone, so a positive one keeps at least the first code.
    least = torch.gt(square, 0, out=below)
    _store(s.exp_avg_sq, torch.maximum(low.add_(up).clamp_(max=V_TOP), least, out=low))


def _uniform(bits: Tensor) -> Tensor:
    return (bits & 0xFFFF).float().mul_(1 / 65536)


def _blocks(x: Tensor) -> Tensor:
    """x as [blocks, 256], zeros behind it."""
    return torch.nn.functional.pad(x.view(-1), (0, -x.numel() % BLOCK)).view(-1, BLOCK)


def _ratio(x: Tensor, absmax: Tensor) -> Tensor:
    """x [blocks, 256], not negative, over the maximum of its block, which goes into absmax."""
    torch.amax(x, 1, out=absmax)
    return x / torch.where(absmax > 0, absmax, 1.0)[:, None]


def _store(codes: Tensor, blocks: Tensor) -> None:
    codes.copy_(blocks.view(-1)[: codes.numel()].view(codes.shape))
