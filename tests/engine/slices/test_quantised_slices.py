"""Slices beside quantised weights: forward and backward of the very function, its scores, what an optimizer changes."""

from __future__ import annotations

import copy
import filecmp
from pathlib import Path

import architectures
import pytest
import quantised
import torch
import toys
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from slicetune.engine import ffn
from slicetune.engine.common.errors import UserError
from slicetune.engine.data.batching import pad
from slicetune.engine.export.audit import audit
from slicetune.engine.methods.landermt import routing
from slicetune.engine.models.quantised import float8, layers
from slicetune.engine.models.shapes import from_config
from slicetune.engine.models.sites import find_ffns
from slicetune.engine.scoring.config import ScoreConfig
from slicetune.engine.scoring.loss import target_losses
from slicetune.engine.scoring.passes import ScoreTap
from slicetune.engine.slices import merge, slice_linears
from slicetune.engine.slices.ffn import fuse
from slicetune.engine.slices.frozen.layer import SlicedLinear
from slicetune.engine.slices.frozen.products import dense
from slicetune.engine.slices.optim import SparseColumnAdamW

KINDS = ("llama, MLP biases", "qwen2", "phi3", "bloom", "falcon, ALiBi")
"""Gated and plain FFNs, biases, one that packs gate and up."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for number, name in enumerate(KINDS):
        architectures.model(name).save_pretrained(root / str(number))
    return {name: root / str(number) for number, name in enumerate(KINDS)}


def attached(folder: Path, how: str, recompute: bool = False) -> tuple[nn.Module, list[nn.Parameter]]:
    """With slices that are no more what they began as."""
    model = quantised.loaded(folder, how)
    params = ffn.attach(model, architectures.neurons(from_config(model.config)), recompute)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in params:
            p.add_(0.1 * torch.randn(p.shape, generator=draw))
    return model, params


def gradients_of(twin: nn.Module, model: nn.Module) -> list[Tensor]:
    """Of the twin's weights, at the places of the model's slices, in their order."""
    found = []
    for name, module in model.named_modules():
        for _, tensor, axis, index in module.parts() if isinstance(module, SlicedLinear) else ():
            own = getattr(twin.get_submodule(name), tensor).grad.index_select(axis, index)
            found.append(own.t() if axis else own)
    return found


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("how", ["nf4", "int8"])
@pytest.mark.parametrize("name", KINDS)
def test_forward_and_backward_are_those_of_the_dequantised_weights_with_the_slices_in(folders, name, how, recompute):
    """Independent: transformers' own modules in float64."""
    model, params = attached(folders[name], how, recompute)
    twin = quantised.twin(folders[name], how, model).requires_grad_(True)
    for each in (model, twin):
        architectures.logits.__wrapped__(each).square().mean().backward()
    assert architectures.relative(architectures.logits(model), architectures.logits(twin)) < 1e-5
    parts = [p for m in model.modules() if isinstance(m, SlicedLinear) for p, *_ in m.parts()]
    assert {id(p) for p in parts} == {id(p) for p in params}
    for p, want in zip(parts, gradients_of(twin, model), strict=True):
        assert architectures.relative(p.grad, want) < 1e-4


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_slices_begin_with_the_unquantised_values(folders, how):
    plain = AutoModelForCausalLM.from_pretrained(folders["bloom"], dtype=torch.float32)
    model = quantised.loaded(folders["bloom"], how)
    ffn.attach(model, architectures.neurons(from_config(model.config)))
    for name, module in model.named_modules():
        for p, tensor, axis, index in module.parts() if isinstance(module, SlicedLinear) else ():
            own = getattr(plain.get_submodule(name), tensor).detach().index_select(axis, index)
            assert torch.equal(p, own.t() if axis else own)


def test_any_layer_can_be_sliced(folders):
    """slice_linears: rows of a query projection, columns of an output's; dx too."""
    model = quantised.loaded(folders["qwen2"], "nf4")
    names = [f"model.layers.1.self_attn.{part}_proj" for part in "qo"]
    params = slice_linears(model, rows={names[0]: [1, 7]}, columns={names[1]: [3, 0, 5]})
    with pytest.raises(UserError, match=r"beside quantised weights: ffn\.save\(model, folder\) writes it"):
        model.save_pretrained("anywhere")
    with torch.no_grad():
        params[0].add_(1)
        params[-1].mul_(2)
    twin = quantised.twin(folders["qwen2"], "nf4", model)
    assert architectures.relative(architectures.logits(model), architectures.logits(twin)) < 1e-5


@pytest.mark.parametrize("how", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["qwen2", "phi3"])
def test_a_model_that_is_cast_afterwards(folders, name, how):
    model, params = attached(folders[name], how)
    loss = model.bfloat16()(input_ids=torch.arange(4, 12)[None]).logits.square().mean()
    assert {p.dtype for p in params} == {torch.bfloat16}
    assert loss.dtype == torch.bfloat16
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in params)


def test_a_base_of_other_values_is_refused(folders, tmp_path):
    """Of the same shapes: slices would begin with another model's values."""
    model = quantised.loaded(folders["qwen2"], "nf4")
    other = AutoModelForCausalLM.from_pretrained(folders["qwen2"], dtype=torch.float32)
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(p.flip(0))
    other.save_pretrained(tmp_path)
    neurons = architectures.neurons(from_config(model.config))
    with pytest.raises(UserError, match="has other values than the quantised"):
        ffn.attach(model, neurons, base=tmp_path)
    assert ffn.attach(model, neurons, base=folders["qwen2"])


@pytest.mark.parametrize("axis", [0, 1])
def test_fp8_replaces_the_chosen_outputs_and_inputs(folders, axis):
    """y = product of what is frozen, plus the slices' own in x's dtype; dx and the gradients likewise, in float64."""
    linear = quantised.loaded(folders["qwen2"], "fp8").model.layers[0].mlp.up_proj
    values, scales = linear.values.clone(), linear.scales.clone()
    index, model = torch.tensor([2, 9, 4]), nn.Sequential(linear)
    (slices,) = slice_linears(model, **{("rows", "columns")[axis]: {"0": index}})
    with torch.no_grad():
        slices.add_(0.3)
    x = torch.randn(7, linear.in_features, generator=torch.Generator().manual_seed(1)).requires_grad_()
    dy = torch.randn(7, linear.out_features, generator=torch.Generator().manual_seed(2))
    y = model(x[None])[0]  # a sentence, as a layer of attention has them
    y.backward(dy)
    frozen = float8.dequantised(values, scales, torch.float64).index_fill(axis, index, 0)
    own = torch.zeros_like(frozen)
    own.index_copy_(axis, index, (slices.t() if axis else slices).detach().double())
    assert torch.equal(dense(model[0], torch.float64), (frozen + own).to(torch.float64))
    x8 = float8.dequantised(*float8.quantised(x.detach()), torch.float64)
    dy8 = dy.double() * scales.double()
    dy8 = float8.dequantised(*float8.quantised(dy8.float()), torch.float64)
    unscaled = frozen / scales.double()[:, None]
    assert architectures.relative(y.detach(), x8 @ frozen.t() + x.detach().double() @ own.t()) < 1e-5
    assert architectures.relative(x.grad, dy8 @ unscaled + dy.double() @ own) < 1e-5
    whole = dy.double().t() @ x.detach().double()
    want = whole.index_select(axis, index)
    assert architectures.relative(slices.grad, want.t() if axis else want) < 1e-5


@pytest.mark.parametrize("how", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["qwen2", "phi3", "bloom"])
def test_scores_are_those_of_the_dequantised_weights(folders, name, how):
    """|activation × gradient| by hooks and autograd on the twin."""
    given, recorder = architectures.examples(3), architectures.Recorder()
    model = quantised.loaded(folders[name], how)
    tap = ScoreTap(recorder, ScoreConfig())
    for fused in fuse(model):
        fused.tap = tap
    batch = pad(given, 0)
    tap.begin(batch)
    losses = target_losses(model, batch)
    sum(losses[batch.target_sample == i].mean() for i in range(len(given))).backward()
    twin = quantised.twin(folders[name], how)
    for i, example in enumerate(given):
        for key, want in architectures.hooked(twin, example).items():
            assert architectures.relative(recorder.scores[key][i], want) < 1e-4


@pytest.mark.parametrize("how", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("name", ["llama", "bloom"])
@pytest.mark.parametrize("site", ["input", "output"])
def test_routed_units_beside_quantised_weights(tmp_path, name, how, site):
    """LANDeRMT's owners and gains: as routed on the twin, whose products round nothing (fp8's do)."""
    (toys.model() if name == "llama" else toys.bloom()).save_pretrained(tmp_path)
    model = quantised.loaded(tmp_path, how)
    units = find_ffns(model)[0].units()
    routes = toys.routes(units, site=site)
    twin = quantised.twin(tmp_path, how, dtype=torch.float32)
    losses = []
    for each in (model, twin):
        routing.attach(each, routes, groups=routes.pairs)
        routing.router_of(each).set(["de-en", "en-fr"])
        losses.append(architectures.logits.__wrapped__(each))
        losses[-1].square().mean().backward()
    for own, other in zip(
        *([m for m in e.modules() if isinstance(m, SlicedLinear)] for e in (model, twin)), strict=True
    ):
        for (p, tensor, *_), (q, *_) in zip(own.parts(), other.parts(), strict=True):
            assert torch.equal(p, q) == (tensor == "bias")  # unquantised values beside quantised ones
            with torch.no_grad():
                p.copy_(q)
    again = architectures.logits(model)
    assert architectures.relative(again, losses[1].detach()) < (0.1 if how == "fp8" else 1e-5)


@pytest.mark.parametrize("how", ["nf4", "int8", "fp8"])
def test_an_optimizer_changes_the_slices_and_no_stored_number(folders, how):
    model, params = attached(folders["qwen2"], how)
    frozen = {name: layer.weight.clone() for name, layer in layers.layers(model)}
    before = [p.detach().clone() for p in params]
    optimizer = SparseColumnAdamW(params, lr=1e-2)
    for _ in range(3):
        target_losses(model, pad(architectures.examples(), 0)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(layer.weight, frozen[name]) for name, layer in layers.layers(model))
    assert not any(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    optimizer.write_back()  # there is nothing to write into


@pytest.mark.parametrize("how", ["nf4", "int8", "fp8"])
def test_the_graph_keeps_no_weight_made_floats(folders, how):
    """Or training would hold the whole model in full precision between forward and backward."""
    model, _ = attached(folders["qwen2"], how)
    sizes, kept = {layer.in_features * layer.out_features for _, layer in layers.layers(model)}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        architectures.logits.__wrapped__(model).sum().backward()
    head = model.get_output_embeddings().weight
    assert len(kept) > 10
    shapes = {(layer.out_features, layer.in_features) for _, layer in layers.layers(model)}
    found = [t for t in kept if t.is_floating_point() and t.data_ptr() != head.data_ptr() and t.shape in shapes]
    assert not [t for t in found if t.numel() in sizes]


def test_masters_follow_what_the_model_loads(folders):
    model = quantised.loaded(folders["qwen2"], "int8", "bfloat16")
    params = ffn.attach(model, architectures.neurons(from_config(model.config)))
    optimizer = SparseColumnAdamW(params, lr=1e-6)
    optimizer.step(lambda: target_losses(model, pad(architectures.examples(), 0)).mean().backward())
    state = {k: v + 1 if k.endswith((".rows", ".columns")) else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    optimizer.step()
    assert all(torch.allclose(p.float(), optimizer.state[p]["master"], atol=0.02) for p in params)
    assert all(
        torch.equal(p, state[name]) for name, p in model.named_parameters() if name.endswith((".rows", ".columns"))
    )


@pytest.mark.parametrize("own", [True, False], ids=["loaded by transformers", "by the engine"])
def test_saved_in_full_precision(folders, tmp_path, own):
    """Every weight is the base's, to the bit, but for the slices; the audit says so too."""
    folder = folders["bloom"]
    if own:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    else:
        model = quantised.loaded(folder, "nf4")
    neurons = architectures.neurons(from_config(AutoModelForCausalLM.from_pretrained(folder).config))
    if own:
        with pytest.raises(UserError, match="slices begin with the unquantised weights: give their folder"):
            ffn.attach(model, neurons)
    params = ffn.attach(model, neurons, base=folder if own else None)
    with torch.no_grad():
        for p in params:
            p.add_(1)
    copy.deepcopy(model).save_pretrained(tmp_path / "other", safe_serialization=True)  # as a trainer calls it
    ffn.save(model, tmp_path / "out")
    assert filecmp.cmp(tmp_path / "other/model.safetensors", tmp_path / "out/model.safetensors", shallow=False)
    assert audit(folder, tmp_path / "out", neurons).ok
    base, saved = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    changed = sum(int((t != saved[name]).sum()) for name, t in base.items())
    assert changed == sum(p.numel() for p in params)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not hasattr(plain.config, "quantization_config")
    assert hasattr(model.config, "quantization_config") == own
    with pytest.raises(UserError, match=r"the model is quantised: ffn\.save\(model, folder\) writes it in full"):
        merge(model)
