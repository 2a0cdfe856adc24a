"""Quantised models: which layers are, what they compute, that nothing hides in them, what PEFT makes of them."""

from __future__ import annotations

from pathlib import Path

import architectures
import pytest
import quantised
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from slicetune.engine.common.errors import UserError
from slicetune.engine.methods.lora import Dora, Lora
from slicetune.engine.models.quantised import stored
from slicetune.engine.models.quantised.layers import dequantised, kind, layers
from slicetune.engine.models.sites import find_ffns

KINDS = ("llama, MLP biases", "qwen2", "gemma2", "phi3", "olmo2", "gpt_neox", "bloom", "falcon, ALiBi")
"""Tied and not, biases, packed and plain FFNs, norms of queries, a linear class of a model's own."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for number, name in enumerate(KINDS):
        architectures.model(name).save_pretrained(root / str(number), max_shard_size="20KB")
    return {name: root / str(number) for number, name in enumerate(KINDS)}


@pytest.mark.parametrize("how", ["nf4", "int8"])
@pytest.mark.parametrize("name", KINDS)
def test_it_computes_what_its_dequantised_weights_do(folders, name, how):
    model, folder = quantised.loaded(folders[name], how), folders[name]
    twin, plain = quantised.twin(folder, how), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(3, 33).view(2, 15)
    gradients = []
    for each in (model, twin):
        x = each.get_input_embeddings()(ids).detach().requires_grad_()
        logits = each(inputs_embeds=x, use_cache=False).logits
        logits.square().mean().backward()
        gradients.append((logits.detach(), x.grad))
    for got, want in zip(*gradients, strict=True):
        assert architectures.relative(got, want) < 1e-5
    away = architectures.relative(gradients[0][0], architectures.logits(plain))
    assert 1e-4 < away < (0.6 if how == "nf4" else 0.1)  # random weights of 32 inputs: the base, and not quite


@pytest.mark.parametrize("name", KINDS)
def test_the_linear_layers_of_the_blocks_are_quantised_and_nothing_else(folders, name):
    model, weights = quantised.loaded(folders[name], "nf4"), {}
    for file in folders[name].glob("*.safetensors"):
        weights |= load_file(file)
    found = dict(layers(model))
    blocks = [site.block for site in find_ffns(model)]
    inside = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(tuple(blocks))}
    assert found.keys() == inside
    assert {kind(layer) for layer in found.values()} == {"nf4"}
    others = [p for n, p in model.named_parameters() if n.removesuffix(".weight") not in found]
    held = {tuple(map(float, t.flatten()[:3])) for t in weights.values()}
    assert all(tuple(map(float, p.flatten()[:3])) in held for p in others)
    assert not any(p.requires_grad for p in model.parameters())


def test_nf4_is_what_transformers_loads(folders):
    """The same bits as of the library's own way with QLoRA's settings."""
    folder = folders["qwen2"]
    settings = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    }
    own = BitsAndBytesConfig(load_in_4bit=True, **settings)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=own, dtype=torch.float32, attn_implementation="eager"
    )
    ours = quantised.loaded(folder, "nf4")
    assert torch.equal(architectures.logits(ours), architectures.logits(theirs.eval()))
    for name, layer in layers(ours):
        assert torch.equal(layer.weight, theirs.get_submodule(name).weight)


def test_int8_is_bitsandbytes_row_by_row(folders):
    """Largest absolute value of a row / 127, rounded: an independent computation."""
    for _, layer in layers(quantised.loaded(folders["qwen2"], "int8")):
        weight = layer.stored.whole().half().float()
        scale = weight.abs().amax(1, keepdim=True) / 127
        steps = dequantised(layer, torch.float32) / scale - (weight / scale).round()
        assert steps.abs().max() < 1.001  # a half is rounded up or down, as it falls
        assert (steps.abs() < 1e-3).float().mean() > 0.99


def test_an_eval_forward_changes_no_weight(folders):
    """bitsandbytes repacks nf4 weights of some CPUs while it decodes, and cannot go back from them."""
    model, ids = quantised.loaded(folders["qwen2"], "nf4"), torch.arange(3, 33).view(2, 15)
    before = {name: layer.weight.clone() for name, layer in layers(model)}
    with torch.no_grad():
        model(ids)
    assert all(torch.equal(layer.weight, before[name]) for name, layer in layers(model))
    assert not any(layer.support_avx512bf16_for_cpu for _, layer in layers(model))


def test_a_layer_knows_its_unquantised_weight(folders):
    """Also where keys and names differ, as GPT-NeoX's do."""
    for name in ("qwen2", "gpt_neox", "bloom"):
        plain = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
        index = torch.tensor([7, 0, 2])
        for own, layer in layers(quantised.loaded(folders[name], "nf4", "bfloat16")):
            weight = plain.get_submodule(own).weight.detach().bfloat16()
            assert torch.equal(layer.stored.whole(), weight)
            assert torch.equal(layer.stored.part(0, index), weight[index])
            assert torch.equal(layer.stored.part(1, index), weight[:, index].t())


def test_a_weight_that_is_not_finite_is_not_hidden(folders, tmp_path):
    AutoModelForCausalLM.from_pretrained(folders["qwen2"], dtype=torch.float32).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for how in ("nf4", "int8", "fp8"):
        with pytest.raises(UserError, match=r"model.safetensors: .*layers\.1\.mlp\.up_proj\.weight holds NaN"):
            quantised.loaded(tmp_path, how)


def test_fp8_takes_no_packed_layer(folders):
    with pytest.raises(UserError, match=r"fp8: model\.layers\.0\.mlp packs gate and up in one layer: use nf4 or int8"):
        quantised.loaded(folders["phi3"], "fp8")


def test_another_models_folder_is_refused(folders, tmp_path):
    model = quantised.loaded(folders["qwen2"], "nf4")
    AutoModelForCausalLM.from_pretrained(folders["qwen2"], dtype=torch.float32).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(weights | {name: weights[name][:-1].contiguous()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"up_proj.weight is \(\d+, \d+\), the quantised .* another: is this the right base model"
    ):
        stored.remember(model, tmp_path)
    with pytest.raises(UserError, match="has no quantised layer"):
        stored.remember(AutoModelForCausalLM.from_pretrained(folders["qwen2"]), folders["qwen2"])


@pytest.mark.parametrize("how", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("method", [Lora(rank=2), Dora(rank=2)], ids=["lora", "dora"])
def test_adapters_begin_as_the_base_and_have_its_dtype(folders, method, how):
    model = quantised.loaded(folders["qwen2"], how, "bfloat16")
    before = architectures.logits(model).float()
    if how == "fp8" and method.magnitude:
        with pytest.raises(UserError, match="DoRA reads the weights themselves, which are fp8: use nf4 or int8"):
            method.prepare(model)
        return
    method.prepare(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    assert architectures.relative(architectures.logits(model), before) < 0.03  # DoRA divides by a norm in bf16
