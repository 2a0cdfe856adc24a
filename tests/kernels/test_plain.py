"""The plain activation of BLOOM's FFN on a CPU: against autograd in float64, with bias, gain and scores."""

import pytest
import torch
from activation_forms import TORCH

from slicetune.engine.common.errors import UserError
from slicetune.kernels.common import torch_blocks
from slicetune.kernels.plain.op import plain_backward, plain_forward
from slicetune.kernels.plain.reference import plain_backward_reference, plain_forward_reference

pytestmark = pytest.mark.usefixtures("poisoned")
SEGMENTS = torch.tensor([[0, 7], [7, 7], [9, 30], [30, 37]], dtype=torch.int32)
TOKENS, UNITS = 41, 24


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of two tokens, so that the torch path meets its own edges."""
    monkeypatch.setattr(torch_blocks, "CPU_BLOCK", 2 * UNITS)


def inputs(bias, gain, dtype=torch.float64):
    torch.manual_seed(0)
    dh, pre = (torch.randn(TOKENS, UNITS, dtype=torch.float64).mul(2).to(dtype) for _ in range(2))
    c = torch.rand(3, UNITS, dtype=torch.float64).to(dtype)
    c[:, ::3] = 0
    route = torch.randint(0, 3, (TOKENS,))
    routing = {None: (None, None), "gain": (c, None), "route": (c, route)}[gain]
    return dh, pre, torch.randn(UNITS, dtype=torch.float64).to(dtype) if bias else None, *routing


def autograd(dh, pre, activation, bias, gain, route):
    """h, dL/dpre, z and dL/dz of a unit that takes part, zero for one that does not, by torch.autograd."""
    pre = pre.detach().requires_grad_()
    c = torch.ones(1, UNITS, dtype=pre.dtype) if gain is None else gain[:1] if route is None else gain[route]
    z = c * pre if bias is None else c * pre + bias
    h = torch.where(c != 0, TORCH[activation](z), 0)
    dpre, dz = torch.autograd.grad(h, (pre, z), dh)
    return h.detach(), dpre, z.detach(), dz, (z > 0) & (c != 0)


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("activation", TORCH)
@pytest.mark.parametrize("gain", [None, "gain", "route"])
@pytest.mark.parametrize("bias", [False, True])
def test_formulas_against_autograd(activation, gain, bias):
    dh, pre, *rest = inputs(bias, gain)
    h, dpre, *_ = autograd(dh, pre, activation, *rest)
    for backward in (plain_backward, plain_backward_reference):
        out = backward(dh, pre, activation, *rest, emit_h=True)
        assert relative(out.dpre, dpre) < 1e-14
        assert relative(out.h, h) < 1e-14
    for forward in (plain_forward, plain_forward_reference):
        assert relative(forward(pre, activation, *rest), h) < 1e-14
    leaf = pre.clone().requires_grad_()
    (got,) = torch.autograd.grad(plain_forward(leaf, activation, *rest), leaf, dh)
    assert relative(got, dpre) < 1e-14


@pytest.mark.parametrize("reduce", ["mean_abs", "abs_sum"])
@pytest.mark.parametrize("gain", [None, "route"])
def test_scores_are_each_samples_own(reduce, gain):
    dh, pre, *rest = inputs(True, gain)
    h, _, z, dz, active = autograd(dh, pre, "gelu_tanh", *rest)
    for backward in (plain_backward, plain_backward_reference):
        out = backward(dh, pre, "gelu_tanh", *rest, segments=SEGMENTS, reduce=reduce)
        product, unit = ((x.abs() if reduce == "mean_abs" else x) for x in (z * dz, h * dh))
        for sample, (begin, end) in enumerate(SEGMENTS.tolist()):
            assert torch.allclose(out.score[sample], product[begin:end].sum(0), rtol=1e-13, atol=1e-13)
            assert torch.allclose(out.unit_score[sample], unit[begin:end].sum(0), rtol=1e-13, atol=1e-13)
            assert torch.allclose(out.activation[sample], h[begin:end].sum(0), rtol=1e-13, atol=1e-13)
            assert torch.equal(out.active[sample], active[begin:end].sum(0).int())
        assert out.active.dtype == torch.int32


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 4e-7), (torch.float16, 3e-4), (torch.bfloat16, 2.5e-3)])
def test_precision_is_no_worse_than_torch(dtype, bound):
    dh, pre, bias, *none = inputs(True, None, dtype)
    want = autograd(dh.double(), pre.double(), "gelu_tanh", bias.double(), *none)
    naive = autograd(dh, pre, "gelu_tanh", bias, *none)
    out = plain_backward(dh, pre, "gelu_tanh", bias, segments=SEGMENTS, emit_h=True)
    for got, own, exact in ((out.h, naive[0], want[0]), (out.dpre, naive[1], want[1])):
        assert got.dtype == dtype
        assert relative(got, exact) < min(bound, 1.05 * relative(own, exact) + 2e-7)
    assert out.score.dtype == torch.float32


def test_compact_columns():
    dh, pre, *rest = inputs(True, "route")
    index = torch.tensor([0, 5, 23])
    out = plain_backward(dh, pre, "gelu", *rest, pre_columns=index, h_columns=torch.arange(UNITS), emit_h=True)
    assert torch.equal(out.dpre_columns, out.dpre[:, index])
    assert torch.equal(out.h_columns, out.h)
    bare = plain_backward(dh, pre, "gelu", *rest)
    assert [name for name, value in vars(bare).items() if value is not None] == ["dpre"]


def test_a_silenced_unit_does_not_leak_its_bias():
    _, pre, bias, *_ = inputs(True, None)
    off = torch.ones(1, UNITS)
    off[0, 4] = 0
    h = plain_forward(pre, "gelu_tanh", bias, off)
    assert torch.equal(h[:, 4], torch.zeros(TOKENS, dtype=torch.float64))
    assert torch.equal(h[:, 5], plain_forward(pre, "gelu_tanh", bias)[:, 5])


def test_opcheck_and_compile():
    dh, pre, bias, gain, route = inputs(True, "route", torch.float32)
    ops, index = torch.ops.slicetune, [torch.arange(16), None]  # fewer are padded with garbage
    torch.library.opcheck(ops.plain_forward, (pre.clone().requires_grad_(), "gelu", bias, gain, route))
    torch.library.opcheck(ops.plain_backward, (dh, pre, "gelu", bias, gain, route, SEGMENTS, False, index, True))
    leaf = pre.clone().requires_grad_()
    compiled = torch.compile(lambda x: plain_forward(x * 2, "gelu", bias), backend="aot_eager", fullgraph=True)
    (got,) = torch.autograd.grad(compiled(leaf), leaf, dh)
    want = autograd(dh.double(), 2 * pre.double(), "gelu", bias.double(), None, None)[1]
    assert relative(got, 2 * want) < 1e-6


def test_unknown_activation():
    with pytest.raises(UserError, match="'swish'"):
        plain_forward(torch.ones(1, 1), "swish")
