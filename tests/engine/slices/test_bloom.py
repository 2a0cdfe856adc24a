"""BLOOM (ALiBi, GELU by the tanh formula, biases, padded batches): trained on two ranks, exported, decoded."""

from __future__ import annotations

import pytest
import torch
import toys
from transformers import AutoModelForCausalLM, BloomForCausalLM

from slicetune.engine.data.batching import pad
from slicetune.engine.export.audit import audit
from slicetune.engine.export.model import export_model
from slicetune.engine.methods.given import Given
from slicetune.engine.models.packing import packs_long_rows, takes_position_ids
from slicetune.engine.models.shapes import from_config
from slicetune.engine.models.sites import find_ffns
from slicetune.engine.scoring.loss import target_losses
from slicetune.engine.slices.ffn import attach
from slicetune.engine.slices.fused import FusedFFN
from slicetune.engine.slices.neurons import NeuronSet
from slicetune.engine.slices.patches import load_masters

FIVE_STEPS = {"train_max_steps": 5, "train_save_steps": 2, "method": Given()}


def neurons() -> NeuronSet:
    """Rows with their bias entries of both projections, and columns of the second; numbers that no rank divides."""
    slices = {(0, "in", "row"): [1, 5, 47], (0, "out", "column"): [2, 3], (1, "out", "row"): [31]}
    shape = from_config(toys.bloom().config)
    tensors = {key: torch.tensor(index) for key, index in slices.items()}
    return NeuronSet(tensors, shape.layers, dict(shape.widths), dict(shape.fan_in))


@pytest.fixture(scope="module")
def runs(pool, tmp_path_factory):
    """Five steps at every stage: {stage: (tensors, what they began with)}."""
    found = {}
    for stage in (1, 2, 3):
        out = tmp_path_factory.mktemp(f"bloom{stage}")
        found[stage] = pool.run("train_method", str(out), FIVE_STEPS | {"zero_stage": stage}, "bloom", neurons())[0]
    return found


def test_rows_columns_and_bias_entries_are_trained_alike_at_every_stage(runs):
    tensors, before = runs[1]
    mlp = "transformer.h.{}.mlp.{}"
    assert set(before) == {
        f"{mlp.format(0, 'dense_h_to_4h')}.rows",
        f"{mlp.format(0, 'dense_h_to_4h')}.bias_rows",
        f"{mlp.format(0, 'dense_4h_to_h')}.columns",
        f"{mlp.format(1, 'dense_4h_to_h')}.rows",
        f"{mlp.format(1, 'dense_4h_to_h')}.bias_rows",
    }
    for name, start in before.items():
        assert not torch.equal(tensors[f"master/{name}"], start), name
    assert sum(p.numel() for p in before.values()) == 3 * (32 + 1) + 2 * 32 + 1 * (128 + 1)
    for other, _ in (runs[2], runs[3]):
        assert other.keys() == tensors.keys()
        assert all(torch.equal(other[name], value) for name, value in tensors.items())


def test_the_export_is_what_was_trained_and_nothing_else_changed(runs, tmp_path):
    tensors, _ = runs[1]
    toys.bloom().save_pretrained(tmp_path / "base")
    patches = Given().patches(tmp_path / "base", neurons(), tensors)
    export_model(tmp_path / "base", patches, tmp_path / "run/model")
    neurons().save(tmp_path / "run/neurons.safetensors")
    report = audit(tmp_path / "base", tmp_path / "run")
    assert report.ok, str(report)
    assert report.changed == {"in": 3 * 33, "out": 2 * 32 + 129}
    live, exported = toys.bloom(), AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").eval()
    attach(live, neurons())
    load_masters(live, tensors)
    assert type(exported) is BloomForCausalLM
    ids = torch.tensor([toys.examples(1)[0].input_ids])
    with torch.no_grad():
        assert (exported(ids).logits - live(ids).logits).abs().max() < 1e-5
        assert (exported(ids).logits - toys.bloom()(ids).logits).abs().max() > 1e-2


def test_what_padding_does_to_the_gradient_of_a_slice():
    """Nothing: the gradients of a padded batch are the sum of those of its sentences alone."""
    examples = toys.examples(5)
    model = toys.bloom().double()
    assert not takes_position_ids(model)
    assert not packs_long_rows(model)
    params = attach(model, neurons())
    padded = torch.autograd.grad(target_losses(model, pad(examples, 0)).sum(), params)
    single = [torch.autograd.grad(target_losses(model, pad([e], 0)).sum(), params) for e in examples]
    for i, gradient in enumerate(padded):
        assert torch.allclose(gradient, sum(s[i] for s in single), rtol=1e-5, atol=1e-5)  # softmax in fp32


def test_left_padding_moves_no_token():
    """ALiBi counts from the first real token: prompts of several lengths, padded on the left, decode as alone."""
    model = toys.bloom()
    prompts = [example.input_ids for example in toys.examples(5)]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": True}
    together = model.generate(input_ids=ids, attention_mask=mask, **settings)[:, width:]
    alone = [model.generate(input_ids=torch.tensor([p]), **settings)[0, len(p) :] for p in prompts]
    assert torch.equal(together, torch.stack(alone))


def test_its_ffn_is_gelu_by_the_tanh_formula_with_biases():
    """In float64, from the formula; transformers writes its constants with eight digits."""
    site = find_ffns(toys.bloom().double())[1]
    first, second = site.module.dense_h_to_4h, site.module.dense_4h_to_h
    with torch.no_grad():
        for layer in (first, second):
            torch.nn.init.normal_(layer.bias)
    x, residual = torch.randn(7, 32, dtype=torch.float64), torch.randn(7, 32, dtype=torch.float64)
    a = x @ first.weight.T + first.bias
    h = 0.5 * a * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (a + 0.044715 * a**3)))
    expected = residual + h @ second.weight.T + second.bias
    assert torch.allclose(FusedFFN(site)(x, residual), expected, rtol=1e-9, atol=1e-9)
    assert torch.allclose(site.module(x, residual), expected, rtol=1e-6, atol=1e-6)
