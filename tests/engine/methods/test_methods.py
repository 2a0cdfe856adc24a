"""Every method trains under ZeRO on two real ranks, resumes to the bit, and exports the model that was trained."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toys
from transformers import AutoConfig, AutoModelForCausalLM

from slicetune.engine import commands
from slicetune.engine.common.errors import UserError
from slicetune.engine.common.settings import as_dict
from slicetune.engine.data import tiny
from slicetune.engine.export import attached as bottleneck
from slicetune.engine.export.config import ExportConfig
from slicetune.engine.export.model import export_model
from slicetune.engine.methods.base import Full
from slicetune.engine.methods.kinds import AnyMethod
from slicetune.engine.methods.lape import Lape
from slicetune.engine.methods.llama_pro import LlamaPro
from slicetune.engine.methods.lora import Dora, Lora, LoraMlp
from slicetune.engine.models.shapes import from_config
from slicetune.engine.run.cli import parse
from slicetune.engine.run.config import RunConfig
from slicetune.engine.slices.patches import load_masters

TRAINED = [Full(), Lora(rank=3), LoraMlp(rank=3), Dora(rank=3), LlamaPro()]
FIVE_STEPS = {"train_max_steps": 5, "train_save_steps": 2}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module", params=TRAINED, ids=lambda method: method.kind)
def trained(request, pool, tmp_path_factory):
    """Five steps of one method at every stage: (method, {stage: (folder, tensors)}, both ranks' starts)."""
    runs = {}
    for stage in (1, 2, 3):
        out = tmp_path_factory.mktemp(f"{request.param.kind}{stage}")
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
    names = [name for name in runs[1][1] if name.startswith("master/")]
    assert len(names) == len(runs[1][1]) // 3 > 0  # beside each two moments
    for name in names:
        a = runs[1][1][name]
        for stage in (2, 3):
            assert (a - runs[stage][1][name]).norm() <= 1e-4 * a.norm(), (name, stage)


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
    assert bounds.added == (0 if method.kind == "full" else bounds.exact)


def test_export_is_the_trained_model(trained, tmp_path):
    """Its logits, loaded by transformers, equal those of the model that was trained, with the masters in it."""
    method, runs, _ = trained
    base, tensors = toys.model(), runs[1][1]
    base.save_pretrained(tmp_path / "base")
    patches = method.patches(tmp_path / "base", None, tensors)
    export_model(tmp_path / "base", patches, tmp_path / "out", expansion=method.expansion(toys.LAYERS))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    live = toys.model()
    method.prepare(live, None)
    load_masters(live, tensors)
    ids = torch.tensor([toys.examples(1)[0].input_ids])
    with torch.no_grad():
        want, got, untrained = (m(ids, use_cache=False).logits for m in (live, exported, base))
        cached = exported.generate(ids, max_new_tokens=4, do_sample=False)
        plain = exported.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert (want - got).abs().max() < 1e-5
    assert (want - untrained).abs().max() > 1e-2
    assert torch.equal(cached, plain)  # every block writes its own part of the cache


def test_units_give_the_same_bits_at_every_stage_and_resume(pool, tmp_path):
    """LAPE's slices: rows of gate and up, columns of down."""
    settings = FIVE_STEPS | {"method": Lape()}
    runs = [pool.run("train_method", str(tmp_path / str(s)), settings | {"zero_stage": s})[0] for s in (1, 2, 3)]
    tensors, before = runs[0]
    assert {name.rpartition(".")[2] for name in before} == {"rows", "columns"}
    assert all(not torch.equal(tensors[f"master/{name}"], p) for name, p in before.items())
    assert all(equal(tensors, other) for other, _ in runs[1:])
    shutil.rmtree(tmp_path / "3" / "checkpoints" / "step-5")
    again = pool.run("train_method", str(tmp_path / "3"), settings | {"zero_stage": 3})[0][0]
    assert equal(again, tensors)


@pytest.mark.parametrize("method", [Full(), Dora(rank=3)], ids=lambda method: method.kind)
def test_bf16_keeps_fp32_masters(method, pool, tmp_path):
    """Adapters have the model's dtype, as every trained parameter; at lr 1e-5 the master moves where bf16 would not."""
    settings = {"zero_stage": 3, "model_dtype": "bfloat16", "train_learning_rate": 1e-5, "train_max_steps": 2}
    tensors, before = pool.run("train_method", str(tmp_path), settings | {"method": method})[0]
    assert {p.dtype for p in before.values()} == {torch.bfloat16}
    for name, p in before.items():
        moved = (tensors[f"master/{name}"] - p.float()).abs()
        assert 0 < moved.max() < 1e-4, name


def test_an_adapter_of_what_is_none_is_refused():
    with pytest.raises(UserError, match="what full trains is no LoRA"):
        RunConfig(method=Full(), export=ExportConfig(adapter="ranks"))


KINDS = {
    "Base": "base",
    "FewShot": "few_shot",
    "Full": "full",
    "Lora": "lora",
    "LoraMlp": "lora_mlp",
    "Dora": "dora",
    "Adapter": "adapter",
    "AdapterLora": "adapter_lora",
    "LlamaPro": "llama_pro",
    "Lape": "lape",
    "Rcn": "rcn",
    "Caneft": "caneft",
    "Given": "given",
    "Landermt": "landermt",
    "Layers": "layers",
    "Ls": "ls",
    "Lg": "lg",
}
"""What config.json and results.json of finished runs say: a name that changed would make them unreadable."""


@pytest.mark.parametrize("kind", AnyMethod.__args__, ids=lambda kind: kind.__name__)
def test_a_recipes_method_survives_the_command_line(kind):
    """Flags change its fields, never its kind, and config.json says which it is."""
    for defaults, args in ((kind(), ["--seed", "3"]), (kind(), [])):
        config = parse(RunConfig(method=defaults), args)
        assert type(config.method) is kind
        assert as_dict(config)["method"]["kind"] == KINDS[kind.__name__]
    assert parse(RunConfig(method=Lora()), ["--method.rank", "3"]).method == Lora(rank=3)


SMALL = "--data.score-sentences 30 --data.train-sentences 12 --data.dev-sentences 4 --data.test-sentences 4"
SMALL += " --evaluate.max-new-tokens 12"


@pytest.mark.parametrize("row", ["base", "lora", "llama_pro", "lape", "adapter_lora_pairs"])
def test_a_recipe_leaves_the_same_artefacts(row, tmp_path):
    """One process, from text to BLEU: what there is to look at does not depend on the method."""
    out, recipe = tmp_path / "out", Path(__file__).parents[3] / "recipes" / f"{row}_tiny.py"
    words = [str(recipe), "--model.path", str(tiny.model_dir("test")), "--out", str(out), *SMALL.split()]
    words += [] if row == "base" else ["--train.epochs", "1", "--train.report-to"]
    row = row.removesuffix("_pairs")
    words += ["--data.pairs"] if row == "adapter_lora" else []  # its recipe has several directions
    words += ["--export.adapter", "ranks"] if row in ("lora", "lape") else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results = json.loads((out / "results.json").read_text())
    assert list(results["systems"]) == (["base"] if row == "base" else ["base", row])
    assert json.loads((out / "config.json").read_text())["method"]["kind"] == results["method"] == row
    assert (out / "report.html").is_file()
    assert len((out / "translations" / row / "koran.en").read_text().splitlines()) == 4
    assert (out / "delta").is_dir() == (out / "neurons.safetensors").is_file() == (row == "lape")
    assert (out / "adapter").is_dir() == (row in ("lora", "lape"))
    if row == "base":
        assert results["trainable_parameters"] == results["added_parameters"] == 0
        return
    bounds = load_recipe(recipe).method.bounds(from_config(AutoConfig.from_pretrained(tiny.model_dir("test"))))
    assert (results["trainable_parameters"], results["added_parameters"]) == (bounds.exact, bounds.added)
    assert f"{bounds.exact:,} trainable parameters" in done.stdout
    assert row.startswith("adapter") or commands.main(["audit", str(out)]) == 0
    if row == "adapter_lora":
        attached = bottleneck.load(out / "attached")
        assert attached.num_parameters() >= bounds.exact
        assert not (out / "model").exists()
    else:
        assert AutoModelForCausalLM.from_pretrained(out / "model").num_parameters() >= bounds.exact


def load_recipe(path: Path) -> RunConfig:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CONFIG
