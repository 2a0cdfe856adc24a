"""`slices.merge` gives the model back as it was, its own modules and all, with the trained values."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import saved
import torch
import toys
from torch import nn

from slicetune.engine import ffn, slices
from slicetune.engine.common.errors import UserError
from slicetune.engine.methods.landermt import routing
from slicetune.engine.slices.ffn import fuse
from slicetune.engine.slices.neurons import NeuronSet

KINDS = ("rows", "columns", "linears")


def trained(kind: str, model: nn.Module | None = None) -> nn.Module:
    model, params = saved.sliced(kind, model=model)
    saved.steps(model, saved.optimizer("torch", params))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_very_modules_come_back(kind):
    plain = toys.model()
    before, kinds = list(plain.modules()), [type(module) for module in plain.modules()]
    model = slices.merge(trained(kind, plain))
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))
    assert [type(module) for module in model.modules()] == kinds
    assert model.state_dict().keys() == toys.model().state_dict().keys()
    assert not any(p.requires_grad for p in model.parameters())


def test_what_follows_goes_as_with_a_plain_model(tmp_path):
    model = trained("columns")
    ffn.save(model, tmp_path)
    plain, merged = saved.loaded(tmp_path).requires_grad_(False), slices.merge(model)
    calls = []
    merged.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(saved.logits(merged), saved.logits(plain))
    assert calls == [1]
    ids = saved.batch()
    traced = [torch.jit.trace(lambda x, m=m: m(input_ids=x).logits, ids)(ids) for m in (merged, plain)]
    exported = [torch.export.export(m, (ids,)).module()(ids).logits for m in (merged, plain)]
    for ours, its in (traced, exported):
        assert torch.equal(ours, its)


def test_quantised_as_the_plain_model(tmp_path):
    model = trained("rows")
    ffn.save(model, tmp_path)
    with warnings.catch_warnings(action="ignore"):
        pair = slices.merge(model), saved.loaded(tmp_path)
        quantised = [torch.ao.quantization.quantize_dynamic(m, {nn.Linear}) for m in pair]
    assert torch.equal(*map(saved.logits, quantised))
    assert "DynamicQuantizedLinear" in repr(quantised[0].model.layers[0].mlp.up_proj)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_on_top(kind):
    from peft import LoraConfig, get_peft_model

    merged = slices.merge(trained(kind))
    base = saved.logits(merged)
    tuned = get_peft_model(merged, LoraConfig(target_modules=["up_proj", "q_proj"], r=2, init_lora_weights=False))
    assert not torch.equal(saved.logits(tuned), base)
    saved.loss(tuned).backward()
    assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)
    assert torch.equal(saved.logits(tuned.unload()), base)


def test_peft_in_an_attached_ffn_is_refused():
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(saved.sliced("columns")[0], LoraConfig(target_modules=["lm_head"], r=2))
    saved.logits(tuned)
    layer = saved.sliced("rows")[0]
    tuned = get_peft_model(layer, LoraConfig(target_modules=r".*\.0\.mlp\.down_proj", r=2))
    with pytest.raises(UserError, match=r"an attached FFN has peft's Linear in it.*slices\.merge"):
        saved.logits(tuned)


def test_hooks_that_were_there_before_fire_again():
    plain, calls = toys.model(), []
    plain.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append("ffn"))
    plain.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: calls.append("gate"))
    saved.logits(slices.merge(trained("rows", plain)))
    assert calls.count("gate") == 1
    assert calls[-1] == "ffn"


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_merges_by_itself(how, kind):
    model = trained(kind)
    twin = how(model)
    merged = saved.logits(slices.merge(twin))
    assert torch.equal(merged, saved.logits(model))
    shared = {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert not shared


def test_merge_of_a_model_that_was_only_fused_or_never_attached():
    model = toys.model()
    before = list(model.modules())
    fuse(model)
    assert all(a is b for a, b in zip(slices.merge(slices.merge(model)).modules(), before, strict=True))


def test_merge_of_one_layer():
    linear = nn.Linear(4, 3)
    layer = slices.SliceLinear(linear, rows=torch.tensor([1]))
    with torch.no_grad():
        layer.rows += 1
    assert slices.merge(layer) is linear
    assert torch.equal(linear.weight[1], layer.rows[0])


def test_train_and_eval_stay():
    model = trained("rows")
    assert slices.merge(model.train()).model.layers[0].mlp.training
    assert not slices.merge(trained("rows").eval()).model.layers[0].mlp.up_proj.training


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_choice_is_refused_until_the_first_is_merged(kind):
    model = trained(kind)
    now = saved.logits(model)
    with pytest.raises(UserError, match=r"trains slices already \(model\.layers\.0.*call slices\.merge\(model\) first"):
        ffn.attach(model, toys.units())
    with pytest.raises(UserError, match="trains slices already"):
        slices.slice_linears(model, rows={"lm_head": [0]})
    assert all(p.requires_grad for name, p in model.named_parameters() if name.endswith(saved.OWN))
    ffn.attach(slices.merge(model), toys.units())
    assert torch.equal(saved.logits(model), now)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"lm_head": [3.5]}, r"lm_head: row index is torch\.float32: give whole numbers"),
        ({"lm_head": [False, True]}, r"lm_head: row index is torch\.bool: .*nonzero"),
        ({"lm_head": [1, 1]}, "lm_head: row index holds duplicates: name every row once"),
        ({"lm_head": []}, "lm_head: row index must be a non-empty list"),
        (["lm_head"], "name what to train"),
        (None, "name what to train"),
    ],
)
def test_what_names_no_rows_is_refused(rows, message):
    with pytest.raises(UserError, match=message):
        slices.slice_linears(toys.model(), rows=rows)


def test_arguments_of_attach_are_checked(tmp_path):
    toys.neurons().save(tmp_path / "neurons.safetensors")
    for wrong in (("neurons.safetensors",), (toys.neurons(), toys.model())):
        with pytest.raises(UserError, match="attach takes a model and a NeuronSet"):
            ffn.attach(*wrong, *[toys.neurons()][len(wrong) - 1 :])


def test_a_refused_choice_changes_nothing():
    model = toys.model()
    before, frozen = list(model.modules()), [p.requires_grad for p in model.parameters()]
    wrong = NeuronSet(
        {(0, "gate", "row"): torch.tensor([1])}, 2, {"gate": 64, "up": 48, "down": 32}, toys.neurons().fan_in
    )
    with pytest.raises(UserError, match="64 rows of 32, the model's 48 rows"):
        ffn.attach(model, wrong)
    with pytest.raises(UserError, match="neuron set is of FFNs with gate up down, the model's have in out"):
        ffn.attach(toys.bloom(), toys.neurons())
    with pytest.raises(UserError, match=r"lm_head: row index 64: the layer has 64"):
        slices.slice_linears(model, rows={"model.layers.0.mlp.up_proj": [0], "lm_head": [64]})
    with pytest.raises(UserError, match=r"no such layer; is it 'model\.layers\.0\.mlp\.up_proj'"):
        slices.slice_linears(model, rows={"layers.0.mlp.up_proj": [0]})
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))
    assert [p.requires_grad for p in model.parameters()] == frozen


def test_a_routed_model_is_refused(tmp_path):
    model, routes = toys.model(), toys.routes()
    routing.attach(model, routes, routes.pairs)
    for use in (slices.merge, lambda m: ffn.save(m, tmp_path)):
        with pytest.raises(UserError, match="is routed by language pair"):
            use(model)


def test_a_quantised_layer_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match=r"Linear of torch\.uint8: this model is quantised, and slices begin with the"):
        slices.slice_linears(model, rows={"0": [1]})


def test_an_optimizer_of_before_moves_the_merged_model_no_more():
    model, params = saved.sliced("rows")
    optimizer = saved.optimizer("ours", params)
    saved.steps(model, optimizer)
    saved.loss(model).backward()
    now = saved.logits(slices.merge(model))
    optimizer.step()
    optimizer.write_back()
    assert torch.equal(saved.logits(model), now)
