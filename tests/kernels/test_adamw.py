"""The AdamW step over slices: against its own formula in float64, and the kernel against the torch reference.

test_slices_triton.py runs the same tests where `adamw_` is the Triton kernel.
"""

import copy
import math

import pytest
import torch

from slicetune.kernels.adamw.op import adamw_
from slicetune.kernels.adamw.reference import (
    Slice,
    adamw_reference,
    mix,
    mix_,
    random_bits,
    read_moments,
    rounding_key,
    stochastic_round,
    write_moments,
)
from slicetune.kernels.common.dispatch import INTERPRET

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Odd, 16 elements together, whole blocks of 256: the three layouts of the kernel; and more than one tile.
SHAPES = [(7, 33), (16, 48), (3, 512), (5,)]


def example(shape, param=F32, weight=None, axis=0, master=False, eight_bit=False, seed=0) -> Slice:
    g = torch.Generator().manual_seed(seed)
    p = torch.randn(shape, generator=g).to(param)
    s = Slice(p, torch.empty_like(p), torch.zeros(shape), torch.zeros(shape), 0, 1e-2, 0.9, 0.95, 1e-8, 0.1)
    if weight is not None:
        k, rest = shape[0], shape[1:]
        s.index = torch.randperm(k + 5, generator=g)[:k].sort().values
        s.weight = torch.randn((k + 5, *rest) if axis == 0 else (*rest, k + 5), generator=g).to(weight)
        s.axis = axis
    s.master = p.float().clone() if master else None
    if eight_bit:
        blocks = math.ceil(p.numel() / 256)
        s.exp_avg, s.exp_avg_sq = s.exp_avg.to(torch.int8), s.exp_avg_sq.to(torch.uint8)
        s.exp_avg_absmax, s.exp_avg_sq_absmax = torch.zeros(blocks), torch.zeros(blocks)
    return s


def gradients(slices: list[Slice], steps: int, seed: int = 1):
    """Set step, key and gradient of each slice, once for each of `steps`."""
    g = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        for i, s in enumerate(slices):
            s.step, s.key = step, rounding_key(seed, i, step)
            s.grad = torch.randn(s.param.shape, generator=g).mul_(10.0 ** -(i % 3)).to(s.grad.dtype)
        yield step


def formula(value, grads, lr, beta1, beta2, eps, decay):
    """Decoupled AdamW in float64, from the paper (Loshchilov & Hutter, Algorithm 2)."""
    value, m, v = value.double(), 0.0, 0.0
    for t, grad in enumerate(grads, 1):
        grad = grad.double()
        m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2
        update = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        value = value - lr * (update + decay * value)
    return value


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("grad", [F32, F16, BF16], ids=str)
def test_formula(shape, grad):
    s = example(shape)
    s.grad, start, seen = s.grad.to(grad), s.param.clone(), []
    for _ in gradients([s], 6):
        seen.append(s.grad * 0.5)
        adamw_([s], torch.tensor([0.5]))
    want = formula(start, seen, s.lr, s.beta1, s.beta2, s.eps, s.weight_decay)
    assert (s.param - want).norm() / want.norm() < 3e-7


@pytest.mark.parametrize(("shape", "axis"), [(s, a) for s in SHAPES for a in range(len(s))], ids=str)
@pytest.mark.parametrize(("param", "master"), [(F32, False), (BF16, True), (F16, True)], ids=str)
def test_scatter(shape, axis, param, master):
    """Chosen rows or columns hold the parameter's values, every other weight its old bits."""
    s = example(shape, param, BF16 if param == F32 else param, axis, master)
    before = s.weight.clone()
    for _ in gradients([s], 2):
        adamw_([s])
    chosen = s.weight.index_select(axis, s.index)
    want = (s.param if axis == 0 else s.param.t()).to(s.weight.dtype)
    if INTERPRET:  # it cuts where hardware rounds
        torch.testing.assert_close(chosen, want, rtol=2**-7, atol=0)
    else:
        assert torch.equal(chosen, want)
    assert not torch.equal(chosen, before.index_select(axis, s.index))
    others = torch.tensor([i for i in range(before.shape[axis]) if i not in s.index])
    assert torch.equal(s.weight.index_select(axis, others), before.index_select(axis, others))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"weight": BF16},
        {"param": BF16, "weight": BF16, "master": True},
        {"weight": BF16, "eight_bit": True},
        {"param": BF16, "weight": BF16, "eight_bit": True},
        {"param": BF16},
        {"param": BF16, "master": True, "eight_bit": True},
    ],
    ids=str,
)
def test_kernel_is_the_reference(shape, options):
    """Both paths over several slices, some with their own settings; equal bits of rounding, so equal codes."""
    slices = [example(shape, **options, seed=0), example((9, 16), **options, seed=1), example(shape, seed=2)]
    slices[1].lr, slices[1].weight_decay = 3e-2, 0.0
    twins = copy.deepcopy(slices)
    scale = torch.tensor([0.7])
    for _ in zip(gradients(slices, 4), gradients(twins, 4), strict=True):
        adamw_(slices, scale)
        adamw_reference(twins, scale)
        for s, twin in zip(slices, twins, strict=True):
            s.exp_avg_absmax is None or assert_codes(s, twin)
            half = {"rtol": 2**-7, "atol": 1e-6} if s.master is not None else {"rtol": 1e-5, "atol": 2e-6}
            torch.testing.assert_close(s.param, twin.param, **half)
            if s.master is not None:
                torch.testing.assert_close(s.master, twin.master, rtol=1e-5, atol=2e-6)


def assert_codes(s: Slice, twin: Slice) -> None:
    """A last bit of float32 may move a code by one, rarely; the maxima agree."""
    for name in ("exp_avg", "exp_avg_sq"):
        difference = (getattr(s, name).int() - getattr(twin, name).int()).abs()
        assert difference.max() <= 1
        assert difference.float().mean() < 0.01
        name += "_absmax"
        torch.testing.assert_close(getattr(s, name), getattr(twin, name), rtol=1e-5, atol=0)


def test_a_graph_from_before_the_step_raises():
    s = example((4, 16), weight=F32)
    x = torch.ones(9, 16, requires_grad=True)
    loss = (x * s.weight).sum() + (s.param * x[:4]).sum()
    for _ in gradients([s], 1):
        adamw_([s])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_slices_and_empty_ones():
    adamw_([])
    s = example((0, 16))
    s.step = 1
    adamw_([s])
    assert s.param.shape == (0, 16)


def test_float64_stays():
    s = example((4, 5), torch.float64)
    s.exp_avg, s.exp_avg_sq = s.exp_avg.double(), s.exp_avg_sq.double()
    start, seen = s.param.clone(), []
    for _ in gradients([s], 5):
        seen.append(s.grad)
        adamw_([s])
    want = formula(start, seen, s.lr, s.beta1, s.beta2, s.eps, s.weight_decay)
    assert (s.param - want).norm() / want.norm() < 1e-15


def test_infinite_gradient_reaches_the_parameter_as_nan_not_as_a_number():
    s = example((4, 64), BF16)
    for _ in gradients([s], 1):
        s.grad[0, 0], s.grad[1, 1] = math.nan, math.inf
        adamw_([s])
    assert s.param[0, 0].isnan()
    assert s.param[1, 1].isnan()
    assert s.param[2:].isfinite().all()


def test_random_bits_are_uniform_and_differ_by_position_step_and_parameter():
    keys = [rounding_key(seed, p, t) for seed in (0, 1) for p in range(20) for t in range(20)]
    assert len(set(keys)) == len(keys)
    bits = random_bits(1 << 16, keys[5])
    share = torch.stack([(bits >> i & 1).double().mean() for i in range(32)])
    assert (share - 0.5).abs().max() < 5 * 0.5 / 256  # five standard errors
    assert bits.unique().numel() == bits.numel()  # a bijection of the position
    other = random_bits(1 << 16, keys[6])
    assert (bits == other).sum() < 3
    assert abs(torch.corrcoef(torch.stack([bits.double(), other.double()]))[0, 1]) < 0.02
    seen = torch.tensor([1, -5, 1 << 30], dtype=torch.int32)
    assert [mix(x & 0xFFFFFFFF) for x in seen.tolist()] == [x & 0xFFFFFFFF for x in mix_(seen.clone()).tolist()]
    own = mix((mix(7 ^ (keys[5] & 0xFFFFFFFF)) + (keys[5] >> 32)) & 0xFFFFFFFF)
    assert int(bits[7]) & 0xFFFFFFFF == own


def test_stochastic_rounding_is_unbiased_and_between_neighbours():
    x = torch.full((1 << 16,), 1 + 2**-7 * 0.3)  # bfloat16 has 1 and 1 + 2**-7
    rounded = stochastic_round(x, random_bits(x.numel(), 77)).float()
    assert set(rounded.unique().tolist()) == {1.0, 1 + 2**-7}
    assert abs(rounded.mean() - x[0]) < 5 * 2**-7 * 0.46 / 256
    assert torch.equal(stochastic_round(-x, random_bits(x.numel(), 77)).float(), -rounded)
    special = torch.tensor([math.inf, -math.inf, 0.0, 1.5])
    assert torch.equal(stochastic_round(special, random_bits(4, 1)).float(), special)
    assert stochastic_round(torch.tensor([math.nan]), random_bits(1, 1)).isnan().all()


def test_eight_bit_moments_are_unbiased_within_half_a_code_and_keep_positive():
    """Mean over many keys is the value itself; a single one is at most one code away; a positive one stays positive."""
    s = example((4, 300), eight_bit=True)
    mean = torch.randn(s.param.shape) * torch.logspace(-4, 0, 300)
    square = mean.square() * torch.rand(mean.shape)
    total_mean, total_square, rounds = torch.zeros_like(mean), torch.zeros_like(square), 400
    for s.key in (rounding_key(0, 0, t) for t in range(rounds)):
        write_moments(s, mean, square)
        m, v = read_moments(s)
        total_mean += m / rounds
        total_square += v / rounds
        assert (v > 0)[square > 0].all()
        assert ((v == 0) == (square == 0)).all()
    top = s.exp_avg_absmax.max()
    spacing = 2 * (mean.abs() * top).sqrt() / 127 + top / 127**2
    assert ((m - mean).abs() <= spacing * 1.001).all()
    assert ((total_mean - mean).abs() < 5 * 0.5 * spacing / rounds**0.5 + 1e-7).all()
    large = square > s.exp_avg_sq_absmax.max() * 1e-4
    spacing = 4 * square**0.75 * s.exp_avg_sq_absmax.max() ** 0.25 / 255 * 1.3
    assert ((total_square - square).abs() < 5 * 0.5 * spacing / rounds**0.5)[large].all()
    assert large.sum() > 100


def test_eight_bit_second_moment_decays():
    """With gradients gone it must fall by beta2 a step: rounded to the nearest code it would stand still."""
    s = example((8, 256), eight_bit=True)
    s.beta2, start = 0.999, 0.0
    for step in gradients([s], 301):
        s.grad *= step == 1
        adamw_reference([s])
        start = read_moments(s)[1].sum() if step == 1 else start
    assert abs(read_moments(s)[1].sum() / start / 0.999**300 - 1) < 0.05
