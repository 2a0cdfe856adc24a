"""SliceLinear and the fused FFN against plain autograd; in somebody else's loop: DDP, FSDP2, Accelerate, HF Trainer."""

from __future__ import annotations

import copy

import pytest
import torch
import toys
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, Gemma2Config, Gemma2ForCausalLM

from slicetune.engine.common.errors import UserError
from slicetune.engine.data.batching import pack, pad
from slicetune.engine.models.sites import find_ffns
from slicetune.engine.scoring.loss import target_losses
from slicetune.engine.slices.ffn import attach, fuse, merge
from slicetune.engine.slices.linear import SliceLinear, _SliceLinear, slice_linears
from slicetune.engine.slices.neurons import NeuronSet

ROWS, COLUMNS = torch.tensor([4, 0, 2]), torch.tensor([5, 1])


def gradients(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    (model(x) ** 2).sum().backward()
    return x.grad


@pytest.mark.parametrize("bias", [True, False])
def test_rows_get_the_dense_gradient(bias):
    torch.manual_seed(0)
    dense = nn.Linear(6, 5, bias=bias, dtype=torch.float64)
    sliced = SliceLinear(copy.deepcopy(dense), rows=ROWS)
    a, b = (torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    a, b = a.clone().requires_grad_(), a.clone().requires_grad_()
    assert torch.allclose(gradients(dense, a), gradients(sliced, b), rtol=1e-12)
    assert torch.allclose(dense.weight.grad[ROWS], sliced.rows.grad, rtol=1e-12)
    assert sliced.weight.grad is None
    if bias:
        assert torch.allclose(dense.bias.grad[ROWS], sliced.bias_rows.grad, rtol=1e-12)


def test_columns_get_the_dense_gradient():
    torch.manual_seed(0)
    dense = nn.Linear(6, 5, dtype=torch.float64)
    sliced = SliceLinear(copy.deepcopy(dense), columns=COLUMNS)
    a = torch.randn(7, 6, dtype=torch.float64)
    gradients(dense, a.clone().requires_grad_())
    gradients(sliced, a.clone().requires_grad_())
    assert torch.allclose(dense.weight.grad[:, COLUMNS].t(), sliced.columns.grad, rtol=1e-12)


def test_gradcheck():
    """Numerical derivatives of the function itself: every input is perturbed, the slices through the weight."""
    sliced = SliceLinear(nn.Linear(6, 5, dtype=torch.float64), rows=ROWS)

    def function(x, rows, bias):
        sliced.rows.data, sliced.bias_rows.data = rows.detach(), bias.detach()
        return _SliceLinear.apply(x, sliced, rows, None, bias)

    inputs = (torch.randn(3, 6, dtype=torch.float64), sliced.rows.detach().clone(), sliced.bias_rows.detach().clone())
    assert torch.autograd.gradcheck(function, tuple(t.requires_grad_() for t in inputs))


def test_the_weight_holds_what_was_trained():
    sliced = SliceLinear(nn.Linear(6, 5), rows=ROWS)
    before = sliced.weight.detach().clone()
    with torch.no_grad():
        sliced.rows += 1
    sliced(torch.randn(1, 6))
    others = [i for i in range(5) if i not in ROWS.tolist()]
    assert torch.equal(sliced.weight[ROWS], sliced.rows)
    assert torch.equal(sliced.weight[others], before[others])


def test_autocast_gives_bf16_products_and_fp32_gradients():
    sliced = SliceLinear(nn.Linear(6, 5), rows=ROWS)
    x = torch.randn(4, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = sliced(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert sliced.rows.grad.dtype == x.grad.dtype == torch.float32


def test_merge_gives_plain_layers_with_the_trained_values():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    params = slice_linears(model, rows={"0": [1, 3]}, columns={"2": [0]})
    assert [tuple(p.shape) for p in params] == [(2, 6), (2,), (1, 2)]
    with torch.no_grad():
        for p in params:
            p.mul_(2)
    x = torch.randn(3, 6)
    expected = model(x)
    merged = merge(model)
    assert {type(m) for m in merged} == {nn.Linear, nn.ReLU}
    assert torch.equal(merged(x), expected)


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ({"0": [6]}, None, "row index 6: the layer has 5"),
        ({"0": [1, 1]}, None, "duplicates"),
        ({"0": []}, None, "non-empty"),
        ({"1": [0]}, None, "not an nn.Linear"),
        ({"0": [1]}, {"0": [1]}, "rows and columns at once"),
        ({"2": [1]}, None, "'2': the model has no such layer; is it '0'?"),
    ],
)
def test_bad_slices_are_refused(rows, columns, message):
    with pytest.raises(UserError, match=message):
        slice_linears(nn.Sequential(nn.Linear(6, 5), nn.ReLU()), rows, columns)


def gemma() -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    config = Gemma2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=toys.VOCAB,
        sliding_window=8,
        final_logit_softcapping=3.0,
        initializer_range=0.1,
        attn_implementation="eager",
    )
    return Gemma2ForCausalLM(config).eval()


def bloom() -> BloomForCausalLM:
    torch.manual_seed(0)
    config = BloomConfig(hidden_size=32, n_head=4, n_layer=2, vocab_size=toys.VOCAB, initializer_range=0.1)
    return BloomForCausalLM(config).eval()


# transformers' BLOOM writes the GELU's constants with eight digits.
BLOOM = {"rtol": 1e-6, "atol": 1e-8}
MODELS = {"llama": toys.model, "gemma2": gemma, "bloom": bloom}


def some_neurons(model) -> NeuronSet:
    site = find_ffns(model)[0]
    widths = {role: getattr(site.module, child).out_features for role, child in site.projections.items()}
    fan_in = {role: getattr(site.module, child).in_features for role, child in site.projections.items()}
    roles = list(widths)
    slices = {
        (layer, role, "row"): torch.tensor([layer, 7, 11 + i]) for i, role in enumerate(roles) for layer in (0, 1)
    }
    del slices[0, roles[-1], "row"]
    slices[0, roles[-1], "column"] = torch.tensor([3, 8])
    return NeuronSet(slices, 2, widths, fan_in)


@pytest.mark.parametrize("kind", MODELS)
def test_fused_model_equals_the_original(kind):
    model = MODELS[kind]().double()
    original = copy.deepcopy(model)
    ids = torch.randint(0, toys.VOCAB, (2, 12), generator=torch.Generator().manual_seed(3))
    fuse(model)
    close = BLOOM if kind == "bloom" else {"rtol": 1e-12, "atol": 1e-12}
    assert torch.allclose(model(ids).logits, original(ids).logits, **close)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_attached_slices_get_the_dense_gradient(kind, recompute):
    model = MODELS[kind]().double()
    original = copy.deepcopy(model)
    attach(model, some_neurons(model), recompute)
    ids = torch.randint(0, toys.VOCAB, (2, 12), generator=torch.Generator().manual_seed(3))
    for m in (model, original):
        m(ids, labels=ids).loss.backward()
    dense = dict(original.named_parameters())
    found = 0
    for name, axis, parameter, index in toys.named_slices(model):
        gradient = dense[name].grad[index] if axis == "row" else dense[name].grad[:, index].t()
        close = BLOOM if kind == "bloom" else {"rtol": 1e-9, "atol": 1e-14}
        assert torch.allclose(parameter.grad, gradient, **close), name
        found += 1
    assert found == (6 if kind != "bloom" else 7)
    assert all(p.grad is None for n, p in model.named_parameters() if not n.endswith(("rows", "columns")))


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_packed_equals_single(kind):
    model, examples = MODELS[kind](), toys.examples(5)
    packed = target_losses(model, pack(examples))
    single = torch.cat([target_losses(model, pack([e])) for e in examples])
    padded = target_losses(model, pad(examples, 0))
    assert torch.allclose(packed, single, rtol=1e-5, atol=1e-5)
    assert torch.allclose(padded, single, rtol=1e-5, atol=1e-5)


def test_bloom_padded_equals_single():
    model, examples = bloom(), toys.examples(5)
    single = torch.cat([target_losses(model, pad([e], 0)) for e in examples])
    assert torch.allclose(target_losses(model, pad(examples, 0)), single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_recomputation_saves_the_input_alone(recompute):
    """Storage that autograd keeps for one FFN: x, g, u; or x."""
    model = toys.model()
    attach(model, toys.neurons(), recompute)
    ffn = model.model.layers[1].mlp
    x = torch.randn(10, toys.HIDDEN, requires_grad=True)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.__setitem__(t.data_ptr(), t.numel()) or t, lambda t: t
    ):
        ffn(x)
    assert sum(kept.values()) == 10 * (toys.HIDDEN if recompute else toys.HIDDEN + 2 * toys.INTERMEDIATE)


def test_a_second_backward_raises():
    """The backward writes over what it saved, and autograd must notice."""
    model = toys.model()
    attach(model, toys.neurons())
    loss = model.model.layers[0].mlp(torch.randn(5, toys.HIDDEN, requires_grad=True)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_ffn_under_autocast():
    """bf16 products, fp32 gradients, within bf16's rounding of the fp32 run."""
    model = toys.model()
    attach(model, toys.neurons())
    ffn = model.model.layers[1].mlp
    x = torch.randn(9, toys.HIDDEN, requires_grad=True)
    wanted = [x, ffn.gate_proj.rows, ffn.up_proj.rows, ffn.down_proj.rows]
    exact = torch.autograd.grad(ffn(x).square().sum(), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        y = ffn(x)
    assert y.dtype == torch.bfloat16
    for got, expected in zip(torch.autograd.grad(y.float().square().sum(), wanted), exact, strict=True):
        assert got.dtype == torch.float32
        assert 0 < (got - expected).norm() < 0.02 * expected.norm()


def test_compiles_without_a_graph_break():
    model = toys.model()
    params = attach(model, toys.neurons())
    ffn = model.model.layers[1].mlp
    x = torch.randn(9, toys.HIDDEN, requires_grad=True)
    wanted = [x, *(p for p in params if any(p is q for q in ffn.parameters()))]
    plain = torch.autograd.grad(ffn(x).square().sum(), wanted)
    compiled = torch.compile(ffn, backend="aot_eager", fullgraph=True)
    again = torch.autograd.grad(compiled(x).square().sum(), wanted)
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(plain, again, strict=True))


def test_a_set_of_another_model_is_refused():
    neurons = toys.neurons()
    wider = NeuronSet(dict(neurons.slices), 2, neurons.widths | {"gate": 64}, neurons.fan_in)
    with pytest.raises(UserError, match="64 rows of 32, the model's 48 rows"):
        attach(toys.model(), wider)


def test_a_model_without_known_ffn_is_refused():
    with pytest.raises(UserError, match="no FFN that this engine knows"):
        find_ffns(nn.Sequential(nn.Linear(3, 3)))
