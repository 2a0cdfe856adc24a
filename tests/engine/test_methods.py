"""Every method trains under ZeRO on two real ranks, resumes to the bit, and exports the model that was trained."""

from __future__ import annotations

import pytest
import torch
import toys
from transformers import AutoModelForCausalLM

from slicetune.engine.cli import parse
from slicetune.engine.config import AnyMethod, RunConfig, as_dict
from slicetune.engine.export import export_model
from slicetune.engine.methods.dora import Dora
from slicetune.engine.methods.full import Full
from slicetune.engine.methods.llama_pro import LlamaPro
from slicetune.engine.methods.lora import Lora
from slicetune.engine.methods.lora_mlp import LoraMlp
from slicetune.engine.shapes import from_config
from slicetune.engine.zero import load_masters

TRAINED = [Full(), Lora(rank=3), LoraMlp(rank=3), Dora(rank=3), LlamaPro()]
FIVE_STEPS = {"train_max_steps": 5, "train_save_steps": 2}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module", params=TRAINED, ids=lambda method: method.name)
def trained(request, pool, tmp_path_factory):
    """Five steps of one method at stages 1 and 3: (method, {stage: (folder, tensors)}, both ranks' starts)."""
    runs = {}
    for stage in (1, 3):
        out = tmp_path_factory.mktemp(f"{request.param.name}{stage}")
        both = pool.run("train_method", str(out), FIVE_STEPS | {"zero_stage": stage, "method": request.param})
        runs[stage] = out, both[0][0]
    return request.param, runs, [before for _, before in both]


def test_ranks_start_alike_and_all_of_it_is_trained(trained):
    _, runs, (first, second) = trained
    assert equal(first, second)
    for name, before in first.items():
        assert not torch.equal(runs[1][1][f"master/{name}"], before), name


def test_stages_agree(trained):
    _, runs, _ = trained
    for name in (n for n in runs[1][1] if n.startswith("master/")):
        a, b = runs[1][1][name], runs[3][1][name]
        assert (a - b).norm() <= 1e-4 * a.norm(), name


@pytest.mark.parametrize("stage", [1, 3])
def test_resume_equals_unbroken(trained, pool, tmp_path, stage):
    method, runs, _ = trained
    settings = FIVE_STEPS | {"zero_stage": stage, "method": method}
    pool.run("train_method", str(tmp_path), settings | {"train_max_steps": 2})
    resumed = pool.run("train_method", str(tmp_path), settings)[0][0]
    assert equal(resumed, runs[stage][1])


def test_counts_are_those_of_the_shape(trained):
    method, _, (before, _) = trained
    bounds = method.bounds(from_config(toys.model().config))
    assert sum(p.numel() for p in before.values()) == bounds.minimum == bounds.maximum == bounds.exact
    assert bounds.added == (0 if method.name == "full" else bounds.exact)


def test_export_is_the_trained_model(trained, tmp_path):
    """Its logits, loaded by transformers, equal those of the model that was trained, with the masters in it."""
    method, runs, _ = trained
    base, tensors = toys.model(), runs[1][1]
    base.save_pretrained(tmp_path / "base")
    patches = method.patches(tmp_path / "base", None, tensors)
    export_model(tmp_path / "base", patches, tmp_path / "out", expansion=method.expansion(toys.LAYERS))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    live = toys.model()
    method.prepare(live, None, toys.config(""))
    load_masters(live, tensors)
    ids = torch.tensor([toys.examples(1)[0].input_ids])
    with torch.no_grad():
        want, got, untrained = (m(ids, use_cache=False).logits for m in (live, exported, base))
        cached = exported.generate(ids, max_new_tokens=4, do_sample=False)
        plain = exported.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert (want - got).abs().max() < 1e-5
    assert (want - untrained).abs().max() > 1e-2
    assert torch.equal(cached, plain)  # every block writes its own part of the cache


def test_full_in_bf16_keeps_fp32_masters(pool, tmp_path):
    settings = {"zero_stage": 3, "model_dtype": "bfloat16", "train_learning_rate": 1e-5, "train_max_steps": 2}
    tensors, before = pool.run("train_method", str(tmp_path), settings | {"method": Full()})[0]
    name = "model.layers.0.self_attn.q_proj.weight"
    moved = (tensors[f"master/{name}"] - before[name].float()).abs()
    assert 0 < moved.max() < 1e-4


@pytest.mark.parametrize("kind", AnyMethod.__args__, ids=lambda kind: kind.__name__)
def test_a_recipes_method_survives_the_command_line(kind):
    """Flags change its fields, never its kind, and config.json says which it is."""
    for defaults, args in ((kind(), ["--seed", "3"]), (kind(), [])):
        config = parse(RunConfig(method=defaults), args)
        assert type(config.method) is kind
        assert as_dict(config)["method"]["kind"] == kind.__module__.rpartition(".")[2]
    assert parse(RunConfig(method=Lora()), ["--method.rank", "3"]).method == Lora(rank=3)
