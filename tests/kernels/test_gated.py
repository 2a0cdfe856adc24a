"""The gated activation on a CPU: against autograd in float64, and what scoring reads from its backward."""

import itertools

import pytest
import torch
from activation_forms import TORCH
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn import functional as F

from slicetune.engine.common.errors import UserError
from slicetune.kernels.common import outputs, torch_blocks
from slicetune.kernels.common.fold import host_tiles
from slicetune.kernels.gated.op import gated_backward, gated_forward
from slicetune.kernels.gated.reference import gated_backward_reference, gated_forward_reference
from slicetune.kernels.tap import tap

pytestmark = pytest.mark.usefixtures("poisoned")
SEGMENTS = torch.tensor([[0, 7], [7, 7], [9, 30], [30, 37]], dtype=torch.int32)
TOKENS, UNITS = 41, 24


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of two tokens, so that the torch path meets its own edges."""
    monkeypatch.setattr(torch_blocks, "CPU_BLOCK", 2 * UNITS)


def inputs(dtype=torch.float64, tokens=TOKENS, units=UNITS):
    torch.manual_seed(0)
    return [torch.randn(tokens, units, dtype=torch.float64).mul(2).to(dtype) for _ in range(3)]


def routing(gain):
    torch.manual_seed(1)
    c = torch.rand(3, UNITS, dtype=torch.float64)
    c[:, ::3] = 0
    route = torch.randint(0, 3, (TOKENS,))
    return {None: (None, None), "gain": (c, None), "route": (c, route)}[gain]


def autograd(dh, gate, up, activation, gain=None, route=None):
    """h, dgate, dup by torch.autograd of act(c·g)·(c·u)."""
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    c = 1 if gain is None else gain[:1] if route is None else gain[route]
    h = TORCH[activation](c * gate) * (c * up)
    return h.detach(), *torch.autograd.grad(h, (gate, up), dh)


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("activation", TORCH)
@pytest.mark.parametrize("gain", [None, "gain", "route"])
def test_formulas_against_autograd(activation, gain):
    dh, gate, up = inputs()
    c = routing(gain)
    h, dgate, dup = autograd(dh, gate, up, activation, *c)
    out = gated_backward(dh, gate, up, activation, *c, emit_h=True)
    want = gated_backward_reference(dh, gate, up, activation, *c, emit_h=True)
    for got in (out, want):
        assert relative(got.dgate, dgate) < 1e-14
        assert relative(got.dup, dup) < 1e-14
        assert relative(got.h, h) < 1e-14
    assert relative(gated_forward(gate, up, activation, *c), h) < 1e-14
    assert relative(gated_forward_reference(gate, up, activation, *c), h) < 1e-14


@pytest.mark.parametrize("activation", TORCH)
def test_gradcheck(activation):
    _, gate, up = (x[:5, :4].contiguous().requires_grad_() for x in inputs())
    assert torch.autograd.gradcheck(lambda g, u: gated_forward(g, u, activation), (gate, up))


@pytest.mark.parametrize("reduce", ["mean_abs", "abs_sum"])
@pytest.mark.parametrize("gain", [None, "route"])
def test_scores_are_each_samples_own(reduce, gain):
    """Every sample run by itself through autograd, its products summed over its tokens."""
    dh, gate, up = inputs()
    c, route = routing(gain)
    out = gated_backward(dh, gate, up, "silu", c, route, segments=SEGMENTS, reduce=reduce)
    size = torch.abs if reduce == "mean_abs" else torch.clone
    for sample, (begin, end) in enumerate(SEGMENTS.tolist()):
        own = slice(begin, end)
        r = None if route is None else route[own]
        h, dg, du = autograd(dh[own], gate[own], up[own], "silu", c, r)
        scale = 1 if c is None else c[r]
        for got, want in (
            (out.gate_score, size(gate[own] * dg)),
            (out.up_score, size(up[own] * du)),
            (out.active, (scale * gate[own] > 0)),
            (out.activation, h),
        ):
            assert torch.allclose(got[sample].double(), want.sum(0).double(), rtol=1e-13, atol=1e-13)
    assert out.active.dtype == torch.int32
    assert torch.equal(out.up_score[1], torch.zeros(UNITS, dtype=torch.float64))
    # u·dL/du = h·dL/dh, so the up channel's score is the intermediate unit's.
    h = autograd(dh, gate, up, "silu", c, route)[0]
    assert torch.allclose(out.up_score[0], size(h * dh)[:7].sum(0), rtol=1e-12)


def test_score_is_the_change_of_the_loss_when_the_channel_is_scaled():
    """Σ_t A·G is the derivative of the loss by a factor on the channel: by finite differences, no autograd."""
    dh, gate, up = inputs()
    out = gated_backward(dh, gate, up, "gelu_tanh", segments=SEGMENTS, reduce="abs_sum")
    step, own = 1e-6, slice(9, 30)

    def loss(g, u):
        return (dh[own] * gated_forward_reference(g[own], u[own], "gelu_tanh")).sum(0)

    for score, change in (
        (out.gate_score, loss(gate * (1 + step), up) - loss(gate * (1 - step), up)),
        (out.up_score, loss(gate, up * (1 + step)) - loss(gate, up * (1 - step))),
    ):
        assert torch.allclose(score[2], change / (2 * step), rtol=1e-6, atol=1e-7)


# The bound is a few roundings of the dtype; torch's own chain of half-precision operations rounds at each of them.
# In float32 gelu_tanh's slope loses one bit more than torch's in 1 - σ.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 4e-7), (torch.float16, 3e-4), (torch.bfloat16, 2.5e-3)])
@pytest.mark.parametrize("activation", TORCH)
def test_precision_is_no_worse_than_torch(dtype, bound, activation):
    dh, gate, up = inputs(dtype)
    wide = autograd(dh.double(), gate.double(), up.double(), activation)
    out = gated_backward(dh, gate, up, activation, emit_h=True)
    torch_own = autograd(dh, gate, up, activation)
    for got, naive, want in zip((out.h, out.dgate, out.dup), torch_own, wide, strict=True):
        assert got.dtype == dtype
        assert relative(got, want) < min(bound, 1.05 * relative(naive, want) + 2e-7)


def test_scores_of_half_inputs_are_float32_and_precise():
    dh, gate, up = inputs(torch.bfloat16)
    out = gated_backward(dh, gate, up, "silu", segments=SEGMENTS)
    want = gated_backward_reference(dh.double(), gate.double(), up.double(), "silu", segments=SEGMENTS)
    for name in ("gate_score", "up_score", "activation"):
        assert getattr(out, name).dtype == torch.float32
        assert relative(getattr(out, name), getattr(want, name)) < 1e-6
    assert torch.equal(out.active, want.active)


def test_columns_of_gate_and_up_lie_side_by_side():
    dh, gate, up = inputs()
    first, second = torch.tensor([0, 5, 23]), torch.tensor([1, 2, 3, 7])
    out = gated_backward(dh, gate, up, "silu", gate_columns=first, up_columns=second)
    buffer = outputs.buffer_of(out.dgate_columns)
    assert buffer.shape == (TOKENS, 16)
    assert torch.equal(buffer[:, :7], torch.cat([out.dgate[:, first], out.dup[:, second]], 1))


def test_compact_columns():
    dh, gate, up = inputs()
    index = torch.tensor([0, 5, 23])
    every, none = torch.arange(UNITS), torch.arange(0)
    out = gated_backward(dh, gate, up, "silu", gate_columns=index, up_columns=every, h_columns=none, emit_h=True)
    assert torch.equal(out.dgate_columns, out.dgate[:, index])
    assert torch.equal(out.dup_columns, out.dup)
    assert out.h_columns.shape == (TOKENS, 0)
    bare = gated_backward(dh, gate, up, "silu")
    assert [name for name, value in vars(bare).items() if value is not None] == ["dgate", "dup"]


def test_gain_of_one_changes_no_bit_and_gain_of_zero_silences():
    dh, gate, up = inputs(torch.float32)
    assert torch.equal(gated_forward(gate, up, "silu"), gated_forward(gate, up, "silu", torch.ones(1, UNITS)))
    off = torch.ones(1, UNITS)
    off[0, 2] = 0
    up[3, 2] = torch.inf  # a silenced unit must not leak 0·inf
    out = gated_backward(dh, gate, up, "silu", off, segments=SEGMENTS, emit_h=True)
    for x in (out.dgate, out.dup, out.h):
        assert torch.equal(x[:, 2], torch.zeros(TOKENS))
    assert not out.active[:, 2].any()
    assert torch.equal(gated_forward(gate, up, "silu", off)[:, 2], torch.zeros(TOKENS))


def test_gradient_of_the_gain_is_in_the_signed_scores():
    """LANDeRMT's learned shares: dL/dc = (g·dg + u·du)/c, which the docstring promises."""
    dh, gate, up = inputs()
    c = (torch.rand(1, UNITS, dtype=torch.float64) + 0.5).requires_grad_()
    (want,) = torch.autograd.grad((F.silu(c * gate) * (c * up)), c, dh)
    whole = torch.tensor([[0, TOKENS]], dtype=torch.int32)
    out = gated_backward(dh, gate, up, "silu", c.detach(), segments=whole, reduce="abs_sum")
    assert relative((out.gate_score + out.up_score) / c.detach(), want) < 1e-13


class Guarded(torch.autograd.Function):
    """An FFN's use of the in-place backward: what it saved is gone after it."""

    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.clone(), up.clone()
        ctx.save_for_backward(gate, up)
        return gated_forward(gate, up, "silu")

    @staticmethod
    def backward(ctx, dh):
        out = gated_backward(dh.contiguous(), *ctx.saved_tensors, "silu", inplace=True)
        return out.dgate, out.dup


def test_in_place_equals_functional_and_refuses_a_second_backward():
    dh, gate, up = inputs(torch.float32)
    index = torch.tensor([1, 2])
    want = gated_backward(dh, gate, up, "silu", segments=SEGMENTS, h_columns=index, emit_h=True)
    own = [x.clone() for x in (dh, gate, up)]
    got = gated_backward(*own, "silu", segments=SEGMENTS, h_columns=index, emit_h=True, inplace=True)
    assert (got.h is own[0], got.dgate is own[1], got.dup is own[2]) == (True, True, True)
    for name, value in vars(want).items():
        assert value is None or torch.equal(value, getattr(got, name)), name
    gate.requires_grad_()
    h = Guarded.apply(gate, up)
    (first,) = torch.autograd.grad(h, gate, dh, retain_graph=True)
    assert torch.equal(first, gated_backward(dh, gate.detach(), up, "silu").dgate)
    with pytest.raises(RuntimeError, match="inplace"):
        torch.autograd.grad(h, gate, dh)


def test_a_sample_has_the_same_bits_alone_and_on_every_run():
    dh, gate, up = inputs(torch.float32)
    runs = [gated_backward(dh, gate, up, "silu", segments=SEGMENTS) for _ in range(2)]
    assert torch.equal(runs[0].gate_score, runs[1].gate_score)
    alone = [x[9:30] for x in (dh, gate, up)]
    out = gated_backward(*alone, "silu", segments=torch.tensor([[0, 21]], dtype=torch.int32))
    assert torch.equal(out.gate_score[0], runs[0].gate_score[2])
    assert torch.equal(out.activation[0], runs[0].activation[2])


@pytest.mark.parametrize("block", [2 * UNITS, 1 << 17])
def test_short_samples_that_share_a_block_have_the_bits_of_each_alone(monkeypatch, block):
    """Lengths 1 to 8 with a gap now and then: samples, tiles and blocks begin and end at every place."""
    monkeypatch.setattr(torch_blocks, "CPU_BLOCK", block)
    dh, gate, up = inputs(torch.float32, units=UNITS + 5)
    edges = torch.tensor([0, 1, 3, 3, 4, 7, 7, 11, 11, 16, 18, 24, 24, 31, 33, 41]).reshape(-1, 2)
    packed = gated_backward(dh, gate, up, "silu", segments=edges.int())
    tapped = tap(gate, dh, edges.int())
    for sample, (begin, end) in enumerate(edges.tolist()):
        own = [x[begin:end] for x in (dh, gate, up)]
        whole = torch.tensor([[0, end - begin]], dtype=torch.int32)
        alone = gated_backward(*own, "silu", segments=whole)
        for name in ("gate_score", "up_score", "active", "activation"):
            assert torch.equal(getattr(alone, name)[0], getattr(packed, name)[sample]), name
        assert torch.equal(alone.dgate, packed.dgate[begin:end])
        assert torch.equal(tap(own[1], own[0], whole)[0], tapped[sample])


def test_no_tokens_and_no_samples():
    nothing = torch.empty(0, UNITS)
    assert gated_forward(nothing, nothing, "silu").shape == (0, UNITS)
    out = gated_backward(nothing, nothing, nothing, "silu", segments=torch.zeros(1, 2, dtype=torch.int32))
    assert torch.equal(out.gate_score, torch.zeros(1, UNITS))
    dh, gate, up = inputs(torch.float32)
    out = gated_backward(dh, gate, up, "silu", segments=torch.empty(0, 2, dtype=torch.int32))
    assert out.gate_score.shape == (0, UNITS)
    assert relative(out.dgate, autograd(dh.double(), gate.double(), up.double(), "silu")[1]) < 1e-6


def test_tiles_visit_every_token_once_and_never_straddle():
    for tokens, rows, edges in itertools.product((0, 1, 50), (1, 7, 64), ([], [3, 3], [0, 20, 20, 50], [1, 49])):
        if edges and edges[-1] > tokens:
            continue
        tiles = host_tiles(torch.tensor(edges, dtype=torch.int32).reshape(-1, 2), tokens, rows)
        assert [t for begin, end, _ in tiles for t in range(begin, end)] == list(range(tokens))
        for begin, end, sample in tiles:
            owner = [s for s in range(len(edges) // 2) if edges[2 * s] <= begin < edges[2 * s + 1]]
            assert 0 < end - begin <= rows
            assert owner == ([sample] if sample >= 0 else [])


@pytest.mark.parametrize("gain", [None, "route"])
def test_opcheck(gain):
    dh, gate, up = inputs(torch.float32)
    c, route = routing(gain)
    c = None if c is None else c.float()
    sixteen = torch.arange(4, 20)  # the padding of fewer is garbage, which no two runs have in common
    ops, index = torch.ops.slicetune, [sixteen, None, sixteen]
    torch.library.opcheck(ops.gated_forward, (gate.clone().requires_grad_(), up, "silu", c, route))
    rest = "silu", c, route, SEGMENTS, True, index, True
    torch.library.opcheck(ops.gated_backward, (dh, gate, up, *rest))
    torch.library.opcheck(ops.gated_backward_, (dh, gate, up, *outputs.empty(gate, SEGMENTS, index, False)[1:], *rest))


def test_under_torch_compile():
    dh, gate, up = inputs(torch.float32)
    gate.requires_grad_()
    up.requires_grad_()
    compiled = torch.compile(lambda g, u: gated_forward(g * 2, u, "gelu_tanh") + 1, backend="aot_eager", fullgraph=True)
    h = compiled(gate, up)
    got = torch.autograd.grad(h, (gate, up), dh)
    _, dgate, dup = autograd(dh.double(), 2 * gate.double(), up.double(), "gelu_tanh")
    assert relative(got[0], 2 * dgate) < 1e-6
    assert relative(got[1], dup) < 1e-6


def test_transforms_and_fake_tensors_go_through_the_dispatcher():
    _, gate, up = inputs(torch.float32)
    both = torch.func.vmap(lambda g: gated_forward(g, up, "silu"))(torch.stack([gate, up]))
    assert torch.equal(both, torch.stack([gated_forward(gate, up, "silu"), gated_forward(up, up, "silu")]))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        index = torch.arange(3)
    out = gated_backward(gate, gate, up, "silu", gate_columns=index)
    assert isinstance(out.dgate, FakeTensor)
    assert mode is out.dgate.fake_mode


def test_unknown_activation():
    _, gate, up = inputs()
    with pytest.raises(UserError, match=r"'quick_gelu'.*silu gelu_tanh gelu relu relu2"):
        gated_forward(gate, up, "quick_gelu")
