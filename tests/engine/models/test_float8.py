"""Products in float8 against float64 on the same values, and against the product that they stand for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from slicetune.engine.models.quantised import float8
from slicetune.engine.models.quantised.float8 import Float8Linear, dequantised, product, pull, quantised

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.bfloat16)
ROUNDING = {torch.float32: 3e-7, torch.bfloat16: 3e-3}
TOKENS, OUT, IN = 33, 48, 80


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of different size."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(torch.randn(shape[0], 1, generator=generator))
    return (torch.randn(*shape, generator=generator) * size).to(dtype)


def error(got: Tensor, want: Tensor) -> float:
    """The relative error of the worst row."""
    assert got.shape == want.shape
    got, want = got.detach().double(), want.detach().double()
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())


def nearest(matrix: Tensor) -> Tensor:
    """A matrix by rows in e4m3 and back, float64, looked up among all numbers of e4m3; of two as near the even one."""
    steps = torch.arange(8, dtype=torch.float64) / 8
    numbers = torch.cat([steps * 2.0**-6, *((1 + steps) * 2.0**power for power in range(-6, 9))])[:-1]  # 480 is NaN
    scales = matrix.float().abs().amax(1, keepdim=True) * (1 / 448)
    divided = (matrix / scales).double()
    distance = (divided.abs()[..., None] - numbers).abs() + torch.arange(len(numbers)) % 2 * 1e-12
    return numbers[distance.argmin(-1)] * divided.sign() * scales.double()


def torch_multiplies_here() -> bool:
    """Scaled products by rows on a CPU are in torch 2.13 and not in 2.11."""
    values, scales = quantised(torch.ones(16, 16))
    try:
        float8.scaled(values, scales, values, scales, torch.bfloat16)
    except (RuntimeError, NotImplementedError):
        return False
    return True


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_scales(dtype):
    weight = draw(OUT, IN, dtype=dtype)
    values, scales = quantised(weight)
    assert (values.dtype, scales.dtype, values.shape, scales.shape) == (float8.FLOAT8, torch.float32, (OUT, IN), (OUT,))
    assert torch.allclose(scales.double(), weight.double().abs().amax(1) / 448, rtol=2e-7, atol=0)
    assert values.float().abs().amax(1).tolist() == [448.0] * OUT
    assert error(dequantised(values, scales, torch.float32), nearest(weight)) < 1e-7
    assert torch.equal(dequantised(values, scales, dtype), dequantised(values, scales, torch.float32).to(dtype))


def test_rows_of_zeros_and_of_next_to_nothing():
    weight = torch.zeros(3, 16)
    weight[1, 2] = 1.0
    weight[2, 2] = 1e-44  # 1e-44 / 448 is zero
    values, scales = quantised(weight)
    assert scales[0] == 1
    got = dequantised(values, scales, torch.float32)
    assert torch.allclose(got[:2], weight[:2], rtol=2e-7, atol=0)
    assert float(got[2].abs().max()) <= 1e-40
    assert product(torch.zeros(2, 16), values, scales).tolist() == [[0.0] * 3] * 2
    assert product(torch.zeros(0, 16), values, scales).shape == (0, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_product(dtype):
    x, weight = draw(TOKENS, IN, seed=1, dtype=dtype), draw(OUT, IN, dtype=dtype)
    got = product(x, *quantised(weight))
    assert got.dtype == dtype
    assert error(got, nearest(x) @ nearest(weight).t()) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_pull(dtype):
    dy, weight = draw(TOKENS, OUT, seed=2, dtype=dtype), draw(OUT, IN, dtype=dtype)
    values, scales = quantised(weight)
    got = pull(dy, values, scales)
    assert got.dtype == dtype
    by_scale = nearest(dy.float() * scales)  # in float32, as pull multiplies
    assert error(got, by_scale @ values.double()) < ROUNDING[dtype]


def test_how_far_off_the_products_are():
    """Of normal values, each operand 2.6 % off, which adds up as squares do."""
    draw = torch.Generator().manual_seed(0)
    x, dy, weight = (torch.randn(*shape, generator=draw) for shape in ((64, 256), (64, 192), (192, 256)))
    values, scales = quantised(weight)
    base = dequantised(values, scales, torch.float64)
    for got, on_base, whole in (
        (product(x, values, scales), x.double() @ base.t(), x.double() @ weight.double().t()),
        (pull(dy, values, scales), dy.double() @ base, dy.double() @ weight.double()),
    ):
        assert 0.02 < error(got.flatten(), on_base.flatten()) < 0.03
        assert 0.03 < error(got.flatten(), whole.flatten()) < 0.04


@pytest.mark.skipif(not torch_multiplies_here(), reason="this torch has no scaled product by rows on a CPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_torchs_product_is_the_emulated_one(dtype):
    x, (values, scales) = quantised(draw(32, IN, seed=3)), quantised(draw(OUT, IN))
    back, ones = quantised(draw(32, OUT, seed=4)), torch.ones(IN)
    for case in ((*x, values, scales, dtype), (*back, values.t(), ones, dtype)):
        assert error(float8.scaled(*case), float8.emulated(*case)) < ROUNDING[dtype]


def test_what_a_gpu_is_given_lies_as_it_must(monkeypatch):
    """The first matrix by rows, the second by columns, float32 scales [T, 1] and [1, n]; the product is the same."""
    x, dy, (values, scales) = draw(TOKENS, IN), draw(TOKENS, OUT), quantised(draw(OUT, IN))
    want = product(x, values, scales), pull(dy, values, scales)

    def scaled_mm(a, b, a_scales, row, b_scales, other, output_dtype):
        assert (a.stride(), b.stride(), row, other) == ((a.shape[1], 1), (1, b.shape[0]), *[row.RowWise] * 2)
        assert (a_scales.shape, b_scales.shape) == ((len(a), 1), (1, b.shape[1]))
        assert a_scales.is_contiguous()
        assert b_scales.is_contiguous()
        return (a_scales * (a.float() @ b.float()) * b_scales).to(output_dtype)

    monkeypatch.setattr(float8, "_has_product", lambda *_: True)
    monkeypatch.setattr(float8.F, "scaled_mm", scaled_mm)
    assert error(product(x, values, scales), want[0]) < ROUNDING[torch.float32]
    assert error(pull(dy, values, scales), want[1]) < ROUNDING[torch.float32]


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_seen(dtype, bad):
    """e4m3 has no infinity: what comes out is NaN in the token's whole row, and in no other."""
    values, scales = quantised(draw(OUT, IN, dtype=dtype))
    for multiplied, width in ((product, IN), (pull, OUT)):
        x = draw(4, width, seed=5, dtype=dtype)
        clean = multiplied(x, values, scales)
        x[2, 7] = bad
        got = multiplied(x, values, scales)
        assert not got[2].isfinite().any()
        others = torch.tensor([0, 1, 3])
        assert torch.equal(got[others], clean[others])
    weight = draw(OUT, IN, dtype=dtype)
    weight[3, 4] = bad
    assert not product(draw(4, IN, dtype=dtype), *quantised(weight))[:, 3].isfinite().any()


@pytest.mark.parametrize("axis", [0, 1])
def test_without(axis):
    values, scales = quantised(draw(OUT, IN))
    index = torch.tensor([2, 31])
    want = values.float().index_fill(axis, index, 0)
    float8.without(values, axis, index)
    assert torch.equal(values.float(), want)
    x = draw(TOKENS, IN, seed=1)
    same = dequantised(values, scales, torch.float64)
    assert error(product(x, values, scales), nearest(x) @ same.t()) < ROUNDING[torch.float32]
    assert not (axis == 0 and product(x, values, scales)[:, index].any())


def plain(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    linear = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(draw(OUT, IN))
        if bias:
            linear.bias.copy_(draw(1, OUT, seed=6)[0])
    return linear.requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer(dtype, bias):
    """Forward and backward against float64; a bias that is trained has its gradient."""
    linear = plain(bias, dtype)
    layer = Float8Linear.of(linear)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features, layer.weight.requires_grad) == (IN, OUT, False)
    assert layer.bias is linear.bias
    if bias:
        layer.bias.requires_grad_(True)
    x = draw(3 * 11, IN, seed=1, dtype=dtype).view(3, 11, IN).requires_grad_()
    y, dy = layer(x), draw(3 * 11, OUT, seed=2, dtype=dtype).view(3, 11, OUT)
    want = nearest(x.detach().flatten(0, 1)) @ nearest(linear.weight).t()
    want = want + linear.bias.detach().double() if bias else want
    assert error(y.flatten(0, 1), want) < 2 * ROUNDING[dtype]  # a bias is added to what is rounded already
    y.backward(dy)
    by_scale = nearest(dy.flatten(0, 1).float() * layer.scales)
    assert (y.dtype, x.grad.dtype) == (dtype, dtype)
    assert error(x.grad.flatten(0, 1), by_scale @ layer.values.double()) < ROUNDING[dtype]
    if bias:
        assert error(layer.bias.grad, dy.double().sum((0, 1))) < 2 * ROUNDING[dtype]
    assert torch.equal(layer(x[0, 0]), y[0, 0])


def test_a_layer_keeps_no_activation():
    kept = []
    layer, x = Float8Linear.of(plain()), draw(TOKENS, IN).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
        assert not kept
        plain()(x)
    assert kept


def test_a_layer_under_autocast():
    layer, x = Float8Linear.of(plain()), draw(TOKENS, IN).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(y, layer(x.bfloat16()))


def bits(layer: Float8Linear) -> tuple[Tensor, Tensor]:
    return layer.values.view(torch.uint8).clone(), layer.scales.view(torch.int32).clone()


CASTS = {
    "bfloat16": lambda module: module.bfloat16(),
    "half": lambda module: module.half(),
    "to": lambda module: module.to(torch.float64),
    "to a device too": lambda module: module.to("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_no_cast_touches_the_values(cast):
    model = nn.Sequential(Float8Linear.of(plain()))
    before = bits(model[0])
    CASTS[cast](model)
    assert all(map(torch.equal, bits(model[0]), before))
    assert (model[0].values.dtype, model[0].scales.dtype) == (float8.FLOAT8, torch.float32)
    assert model[0].bias.dtype != torch.float32


def test_copies_and_state_dicts():
    state = torch.get_rng_state()
    linear = plain()
    drawn = torch.get_rng_state()
    layer = Float8Linear.of(linear)
    assert torch.equal(torch.get_rng_state(), drawn)
    torch.set_rng_state(state)
    twin = copy.deepcopy(layer)
    float8.without(twin.values, 0, torch.arange(OUT))
    assert not twin.values.float().any()
    assert layer.values.float().any()
    assert sorted(layer.state_dict()) == ["bias", "scale_bits", "weight"]
    twin.load_state_dict(layer.state_dict())
    assert all(map(torch.equal, bits(twin), bits(layer)))
    x = draw(TOKENS, IN)
    assert torch.equal(twin(x), layer(x))
