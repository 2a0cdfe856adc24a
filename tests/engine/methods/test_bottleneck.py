"""Bottleneck adapters: their formula, counts by hand, training on two ranks, and what is saved beside the base."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
import toys

from slicetune.engine.common.errors import UserError
from slicetune.engine.export import attached as bottleneck
from slicetune.engine.methods.adapter import DEVIATION, Adapter, AdapterLora, Bottleneck
from slicetune.engine.methods.lora import Lora, LoraMlp
from slicetune.engine.models import load as models
from slicetune.engine.models.config import ModelConfig
from slicetune.engine.models.shapes import from_config, known

QKV = ("query_key_value",)
METHODS = [Adapter(width=5), AdapterLora(width=5, rank=3, target_modules=QKV)]
FIVE_STEPS = {"train_max_steps": 5, "train_save_steps": 2, "train_learning_rate": 1e-2}
PLACES = {"model": ("self_attn.o_proj", "mlp.down_proj"), "bloom": ("self_attention.dense", "mlp.dense_4h_to_h")}

BAICHUAN2_7B, BLOOM_7B1 = known("Baichuan2-7B"), known("BLOOM-7b1")


def test_the_formula_in_float64():
    torch.manual_seed(0)
    layer = Bottleneck(torch.nn.Linear(6, 4), 3).double()
    torch.nn.init.normal_(layer.up.weight)
    x = torch.randn(7, 6, dtype=torch.float64)
    y = x @ layer.linear.weight.T + layer.linear.bias
    inner = y @ layer.down.weight.T + layer.down.bias
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    expected = y + inner @ layer.up.weight.T + layer.up.bias
    assert torch.allclose(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("toy", PLACES)
def test_two_a_block_behind_attention_and_ffn_and_near_the_identity(toy):
    base = getattr(toys, toy)()
    model = copy.deepcopy(base)
    Adapter(width=5).prepare(model, None)
    found = [name for name, module in model.named_modules() if isinstance(module, Bottleneck)]
    head = "model.layers" if toy == "model" else "transformer.h"
    assert found == [f"{head}.{i}.{place}" for i in range(toys.LAYERS) for place in PLACES[toy]]
    ids = torch.tensor([toys.examples(1)[0].input_ids])
    difference = (model(ids).logits - base(ids).logits).abs().max()
    assert 0 < difference < 1e-4  # 0.001² × what goes in
    drawn = torch.cat([p.flatten() for n, p in model.named_parameters() if p.requires_grad and p.ndim == 2])
    assert DEVIATION * 0.8 < drawn.std() < DEVIATION
    assert drawn.abs().max() <= 2 * DEVIATION
    added = {f"{name}.{part}.{kind}" for name in found for part in ("down", "up") for kind in ("weight", "bias")}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == added


def test_the_adapter_reads_the_projection_and_writes_before_the_residual():
    """With W_up = 0 and b_up = c the FFN gives c more."""
    model = toys.bloom()
    Adapter(width=5).prepare(model, None)
    block, base = model.transformer.h[0], toys.bloom().transformer.h[0]
    with torch.no_grad():
        for adapter in (block.self_attention.dense, block.mlp.dense_4h_to_h):
            adapter.up.weight.zero_()
        block.mlp.dense_4h_to_h.up.bias.fill_(0.25)
    x, residual = torch.randn(2, 3, toys.HIDDEN), torch.randn(2, 3, toys.HIDDEN)
    assert torch.allclose(block.mlp(x, residual), base.mlp(x, residual) + 0.25, atol=1e-6)


def test_counts_of_the_papers_models_by_hand():
    """BLOOM-7b1: 30 layers, H 4096, packed 12288; Baichuan2-7B as a Llama: 32 layers, H 4096, three of 4096."""
    adapter = 60 * (2 * 4096 * 1640 + 1640 + 4096)
    assert adapter == 806_436_960 == Adapter().bounds(BLOOM_7B1).exact
    lora = 30 * 64 * (4096 + 12288)
    assert lora == 31_457_280 == Lora(rank=64, target_modules=QKV).bounds(BLOOM_7B1).exact
    both = 60 * (2 * 4096 * 1576 + 1576 + 4096) + lora
    assert both == 806_433_120 == AdapterLora().bounds(BLOOM_7B1).exact
    llama = ("q_proj", "k_proj", "v_proj")
    lora = 32 * 3 * 64 * (4096 + 4096)
    assert lora == 50_331_648 == Lora(rank=64, target_modules=llama).bounds(BAICHUAN2_7B).exact
    both = 64 * (2 * 4096 * 1576 + 1576 + 4096) + lora
    assert both == 876_972_544 == AdapterLora(target_modules=llama).bounds(BAICHUAN2_7B).exact
    assert 64 * (2 * 4096 * 1640 + 1640 + 4096) == 860_199_424 == Adapter().bounds(BAICHUAN2_7B).exact


@pytest.fixture(scope="module")
def runs(pool, tmp_path_factory):
    """Five steps of adapters and LoRA on BLOOM at every stage: {stage: (folder, tensors)}, both ranks' starts."""
    found, starts = {}, []
    for stage in (1, 2, 3):
        out = tmp_path_factory.mktemp(f"adapter{stage}")
        both = pool.run("train_method", str(out), FIVE_STEPS | {"zero_stage": stage, "method": METHODS[1]}, "bloom")
        found[stage], starts = (out, both[0][0]), [before for _, before in both]
    return found, starts


def masters(tensors):
    return {name.removeprefix("master/"): t for name, t in tensors.items() if name.startswith("master/")}


def test_all_of_it_is_trained_and_stages_agree(runs):
    found, (first, second) = runs
    assert sum(p.numel() for p in first.values()) == METHODS[1].bounds(from_config(toys.bloom().config)).exact
    one = masters(found[1][1])
    assert one.keys() == first.keys() == second.keys()
    for name, before in first.items():
        assert torch.equal(before, second[name])
        assert not torch.equal(one[name], before), name
        for stage in (2, 3):
            assert (one[name] - masters(found[stage][1])[name]).norm() <= 1e-4 * one[name].norm(), (name, stage)


def test_resume_equals_unbroken(runs, pool):
    out, tensors = runs[0][3]
    shutil.rmtree(out / "checkpoints" / "step-5")
    settings = FIVE_STEPS | {"zero_stage": 3, "method": METHODS[1]}
    again = pool.run("train_method", str(out), settings, "bloom")[0][0]
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


@pytest.fixture(params=METHODS, ids=lambda method: method.kind)
def attached(request, tmp_path):
    """A live model with adapters of any values, and the folder that holds them."""
    live = toys.bloom()
    request.param.prepare(live, None)
    with torch.no_grad():
        trained = {n: p.normal_(std=0.3) for n, p in live.named_parameters() if p.requires_grad}
    tensors = {f"{kind}/{n}": p.clone() for n, p in trained.items() for kind in ("master", "exp_avg")}
    toys.bloom().save_pretrained(tmp_path / "base")
    known = models.fingerprint(tmp_path / "base")
    line = bottleneck.save(tmp_path / "run/attached", request.param, str(tmp_path / "base"), known, tensors)
    assert f"{sum(p.numel() for p in trained.values()):,} trained parameters beside the base" in line
    return live, tmp_path / "run/attached"


def test_loaded_is_what_was_trained(attached):
    live, folder = attached
    again = bottleneck.load(folder, config=ModelConfig(dtype="float32"))
    ids = torch.tensor([toys.examples(1)[0].input_ids])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, live(ids).logits)
        assert (again(ids).logits - toys.bloom()(ids).logits).abs().max() > 1e-2
        cached = again.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True)
        plain = again.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)
    assert not any(p.requires_grad for p in again.parameters())


def test_what_does_not_fit_is_refused(attached):
    _, attached = attached
    other = toys.bloom(seed=1)
    other.config.name = "another"
    other.save_pretrained(attached.parents[1] / "other")
    with pytest.raises(UserError, match="was not trained on"):
        bottleneck.load(attached, str(attached.parents[1] / "other"))
    about = json.loads((attached / "attached.json").read_text())
    for spoilt, words in (
        (about | {"format": 2}, "another one"),
        (about | {"method": {"kind": "full"}}, "Full attaches no adapters"),
        (about | {"method": about["method"] | {"width": 0}}, "--method.width 0"),
        ([], "not an adapter of a run"),
    ):
        (attached / "attached.json").write_text(json.dumps(spoilt))
        with pytest.raises(UserError, match=words):
            bottleneck.load(attached)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Adapter(width=0), "--method.width 0: must be at least 1"),
        (lambda: AdapterLora(target_modules=("dense",)), "--method.target-modules dense: name some of"),
        (lambda: AdapterLora(rank=0), "--method.rank 0"),
        (
            lambda: Lora(target_modules=("query_key_value", "q_proj", "up")).bounds(BLOOM_7B1),
            "target-modules: BLOOM-7b1 has query_key_value, but not q_proj, up: name some of query_key_value, dense, ",
        ),
        (
            lambda: AdapterLora(target_modules=("query_key_value", "q_proj")).bounds(BLOOM_7B1),
            "BLOOM-7b1 has query_key_value, but not q_proj: name some of ",
        ),
    ],
)
def test_bad_settings_are_one_line(make, words):
    with pytest.raises(UserError, match=words):
        make()


@pytest.mark.parametrize(
    ("method", "elsewhere", "shape"),
    [
        (Lora(target_modules=("q_proj", "k_proj")), Lora(), BLOOM_7B1),
        (Lora(target_modules=QKV), Lora(), BAICHUAN2_7B),
        (LoraMlp(target_modules=("q_proj",)), LoraMlp(), BLOOM_7B1),
        (AdapterLora(target_modules=("q_proj", "k_proj")), AdapterLora(target_modules=QKV), BLOOM_7B1),
        (AdapterLora(target_modules=QKV), AdapterLora(target_modules=("q_proj", "k_proj", "v_proj")), BAICHUAN2_7B),
    ],
    ids=["lora on bloom", "lora on llama", "lora_mlp", "adapter_lora on bloom", "adapter_lora on llama"],
)
def test_layers_of_another_architecture_are_found_here(method, elsewhere, shape):
    """Counts, saved activations and the layers are those of a recipe that is written for this model; and it is said."""
    assert method.layers(shape) == elsewhere.layers(shape)
    assert method.bounds(shape) == elsewhere.bounds(shape)
    assert method.saved_values(shape) == elsewhere.saved_values(shape)
    (line,) = method.notes(shape)
    assert line.startswith(f"--method.target-modules {' '.join(method.target_modules)}: {shape.name} has none of these")
    assert line.endswith(f"taken: {', '.join(method.layers(shape))}")
    assert not elsewhere.notes(shape)


def test_what_is_trained_is_what_was_counted():
    for method in (Lora(rank=3, target_modules=("q_proj",)), AdapterLora(5, 3, target_modules=("q_proj", "v_proj"))):
        model = toys.bloom()
        method.prepare(model, seed=0)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == method.bounds(from_config(model.config)).exact
