"""Runs on a quantised base: from text to scores on two ranks, what is exported and measured, resumes, refusals."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import architectures
import pytest
import quantised
import torch
import toys
from jobs import ROOT, SMALL
from peft import PeftModel
from transformers import AutoModelForCausalLM

from slicetune.engine.common import checkpoint
from slicetune.engine.common.errors import UserError
from slicetune.engine.common.files import cache_dir
from slicetune.engine.data import tiny
from slicetune.engine.evaluation.config import EvaluateConfig
from slicetune.engine.export.audit import audit
from slicetune.engine.methods.base import Full
from slicetune.engine.methods.landermt.settings import Landermt, Layers
from slicetune.engine.methods.lape import Lape
from slicetune.engine.methods.llama_pro import LlamaPro
from slicetune.engine.methods.lora import Dora, Lora
from slicetune.engine.models.config import ModelConfig
from slicetune.engine.run.cli import parse
from slicetune.engine.run.config import RunConfig
from slicetune.engine.run.run import run_one
from slicetune.engine.scoring.statistics import Statistics
from slicetune.engine.slices.ffn import attach
from slicetune.engine.slices.neurons import NeuronSet
from slicetune.engine.slices.patches import load_masters
from slicetune.engine.training.config import ZeroConfig


def words(out: Path, **flags: str) -> list[str]:
    given = SMALL | {"--model.path": str(tiny.model_dir("test")), "--out": str(out), "--model.quantize": "nf4"}
    given |= {"--export.adapter": "one_rank"} | {f"--{name}": value for name, value in flags.items()}
    return [word for pair in given.items() for word in pair if word]


@pytest.fixture(scope="module")
def finished(pool, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("quantised") / "out"
    results, _ = pool.run("run_recipe", str(ROOT / "recipes/caneft_tiny.py"), words(out), str(cache_dir()))
    return out, results


def test_the_export_is_the_full_precision_base_with_the_slices_in(finished):
    out, base = finished[0], tiny.model_dir("test")
    report = audit(base, out)
    assert report.ok
    assert report.likeness.deviation < 1e-6
    neurons = NeuronSet.load(out / "neurons.safetensors")
    assert sum(report.changed.values()) == neurons.parameters() > 0


def test_peft_loads_the_adapter_on_the_full_base(finished):
    out, options = finished[0], {"dtype": torch.float32}
    exported = AutoModelForCausalLM.from_pretrained(out / "model", **options)
    base = AutoModelForCausalLM.from_pretrained(tiny.model_dir("test"), **options)
    before = architectures.logits(base)
    adapted = architectures.logits(PeftModel.from_pretrained(base, out / "adapter"))
    assert architectures.relative(adapted, architectures.logits(exported)) < 1e-5
    assert architectures.relative(adapted, before) > 1e-3


def test_it_was_scored_and_measured_on_the_quantised_base(finished, tmp_path):
    """Scores of another base are others, and what decoded has the checkpoint's slices beside stored numbers."""
    out, results = finished
    assert (results["quantize"], results["measured_on"]) == ("nf4", "nf4")
    assert json.loads((out / "stages.json").read_text())["score"]["settings"]["quantize"] == "nf4"
    assert (out / "translations" / "weights.txt").read_text() == "nf4\n"
    assert Statistics.sums(out / "statistics.safetensors").provenance["quantize"] == "nf4"
    model = quantised.loaded(tiny.model_dir("test"), "nf4")
    attach(model, NeuronSet.load(out / "neurons.safetensors"))
    load_masters(model, checkpoint.load(out / json.loads((out / "chosen.json").read_text())["checkpoint"])[0])
    twin = quantised.twin(tiny.model_dir("test"), "nf4", model, torch.float32)
    assert architectures.relative(architectures.logits(model), architectures.logits(twin)) < 1e-5


def test_both_bases_can_be_measured_and_nothing_is_lost(pool, finished, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "out")
    first = (out / "translations/caneft/law.en").read_text()
    recipe = str(ROOT / "recipes/caneft_tiny.py")
    full, _ = pool.run("run_recipe", recipe, words(out, **{"evaluate.on": "full"}), str(cache_dir()))
    assert full["measured_on"] == "full"
    assert (out / "translations-nf4/caneft/law.en").read_text() == first
    assert not (out / "translations/weights.txt").exists()
    assert "translate in full precision" in full["seconds"]
    again, _ = pool.run("run_recipe", recipe, words(out), str(cache_dir()))
    assert again["measured_on"] == "nf4"
    assert again["systems"] == finished[1]["systems"]
    assert (out / "translations/caneft/law.en").read_text() == first
    assert (out / "translations-full/caneft/law.en").is_file()
    shutil.rmtree(out / "checkpoints")
    shutil.rmtree(out / "translations/caneft")
    config = parse(runpy.run_path(recipe)["CONFIG"], words(out))
    with pytest.raises(UserError, match=r"is gone: .*--evaluate\.on full decodes the export"):
        run_one(config)


def test_a_run_of_another_base_is_refused(finished):
    recipe = runpy.run_path(str(ROOT / "recipes/caneft_tiny.py"))["CONFIG"]
    config = parse(recipe, words(finished[0], **{"model.quantize": "int8"}))
    with pytest.raises(UserError, match=r"made with other settings \(quantize: nf4 → int8\)"):
        run_one(config)


@pytest.mark.parametrize(("method", "how"), [(Lape(), "nf4"), (Lora(rank=3), "int8")])
def test_stages_agree_and_resumes_are_exact(pool, tmp_path, method, how):
    toys.model().save_pretrained(tmp_path / "base")
    given = {"train_max_steps": 4, "train_save_steps": 2, "method": method, "model_quantize": how}
    run = lambda out, **more: pool.run(  # noqa: E731
        "train_shared", str(tmp_path / "base"), str(tmp_path / out), given | more, None, "whole"
    )[0][0]
    unbroken, other = run("1"), run("2", zero_stage=2, model_activation_checkpointing="on")
    assert all(torch.allclose(unbroken[name], value, rtol=1e-4, atol=1e-7) for name, value in other.items())
    run("again", train_max_steps=2)
    resumed = run("again")
    assert resumed.keys() == unbroken.keys()
    assert all(torch.equal(resumed[name], value) for name, value in unbroken.items())


def test_routed_training_resumes(pool, tmp_path):
    toys.bloom().save_pretrained(tmp_path / "base")
    given = {"train_max_steps": 4, "train_save_steps": 2, "model_quantize": "nf4"}
    given |= {"train_global_batch_size": 8, "train_micro_batch_size": 2}
    run = lambda out, **more: pool.run(  # noqa: E731
        "train_routed_shared", str(tmp_path / "base"), str(tmp_path / out), given | more, 4 * toys.HIDDEN, {}, "whole"
    )[0]
    unbroken = run("1")
    run("again", train_max_steps=2)
    resumed = run("again")
    assert all(torch.equal(resumed[name], value) for name, value in unbroken.items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": Full()}, "nf4: Full trains whole weights of the base"),
        ({"method": Layers()}, "nf4: Layers trains whole weights"),
        ({"method": LlamaPro()}, "nf4: LLaMA Pro trains whole weights"),
        ({"method": Landermt(attention=True)}, "nf4: LANDeRMT with --method.attention trains whole weights"),
        ({"model": ModelConfig(quantize="fp8"), "method": Dora()}, "fp8: DoRA reads the weights themselves: use nf4"),
        ({"zero": ZeroConfig(3)}, "not cut up among ranks: leave out --zero.stage 3"),
        ({"model": ModelConfig(quantize="nf4", partition="on")}, "leave out --model.partition on"),
        ({"model": ModelConfig(quantize="nf4", compile="blocks")}, "quantised blocks are not compiled"),
        (
            {"model": ModelConfig(), "evaluate": EvaluateConfig(on="quantised")},
            "the base is not quantised: set --model",
        ),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(changes, words):
    with pytest.raises(UserError, match=words):
        RunConfig(**{"model": ModelConfig(quantize="nf4")} | changes)
