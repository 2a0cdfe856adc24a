"""The audit: passes what each method may change, and finds a single flipped bit anywhere else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from slicetune.engine.commands import main
from slicetune.engine.common.errors import UserError
from slicetune.engine.common.settings import as_dict
from slicetune.engine.export.audit import audit
from slicetune.engine.export.model import export_model
from slicetune.engine.methods.adapter import Adapter
from slicetune.engine.methods.base import Base, Full
from slicetune.engine.methods.llama_pro import LlamaPro
from slicetune.engine.methods.lora import Dora, Lora, LoraMlp
from slicetune.engine.methods.method import Method
from slicetune.engine.run.config import RunConfig
from slicetune.engine.slices.neurons import NeuronSet
from slicetune.engine.slices.patches import Patch

GATE, DOWN = "model.layers.1.mlp.gate_proj.weight", "model.layers.0.mlp.down_proj.weight"


def llama(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size="20KB")
    return folder


def chosen() -> NeuronSet:
    slices = {(1, "gate", "row"): torch.tensor([2, 40]), (0, "down", "column"): torch.tensor([7])}
    return NeuronSet(slices, 2, {"gate": 48, "up": 48, "down": 32}, {"gate": 32, "up": 32, "down": 48})


def run_folder(tmp_path: Path, dtype: str = "auto", base_dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Path]:
    base = llama(tmp_path / "base", base_dtype)
    patches = {
        GATE: Patch("row", torch.tensor([2, 40]), torch.full((2, 32), 3.0)),
        DOWN: Patch("column", torch.tensor([7]), torch.full((1, 32), 4.0)),
    }
    export_model(base, patches, tmp_path / "run" / "model", dtype)
    chosen().save(tmp_path / "run" / "neurons.safetensors")
    return base, tmp_path / "run"


def edit(model: Path, name: str, change) -> None:
    for path in model.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name] = change(tensors[name].clone())
            save_file(tensors, path, {"format": "pt"})


def test_a_trained_model_passes_with_its_counts(tmp_path, capsys):
    base, run = run_folder(tmp_path)
    report = audit(base, run)
    assert report.ok
    assert report.allowed == {"gate": 64, "up": 0, "down": 32}
    assert report.changed == {"gate": 64, "down": 32}
    assert report.weights == sum(t.numel() for p in base.glob("*.safetensors") for t in load_file(p).values())
    assert main(["audit", str(base), str(run)]) == 0
    assert "outside: none changed" in capsys.readouterr().out


@pytest.mark.parametrize("where", [(1, 0), (3, 31), (41, 5)])
def test_one_flipped_bit_beside_the_chosen_rows_is_named(tmp_path, capsys, where):
    base, run = run_folder(tmp_path)

    def flip(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(torch.int16)[where] ^= 1
        return tensor

    edit(run / "model", GATE, flip)
    report = audit(base, run)
    assert [(d.tensor, d.count, d.positions[0][0]) for d in report.outside] == [(GATE, 1, list(where))]
    assert report.changed["gate"] == 64
    assert main(["audit", str(base), str(run)]) == 1
    assert f"OUTSIDE, {GATE}: 1 weights differ\n    at {list(where)}: base" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", DOWN])
def test_other_tensors_are_looked_at_too(tmp_path, name):
    base, run = run_folder(tmp_path)
    edit(run / "model", name, lambda t: t.index_fill(t.dim() - 1, torch.tensor([9]), 0.5))
    report = audit(base, run)
    assert [d.tensor for d in report.outside] == [name]
    assert report.changed == {"gate": 64, "down": 32}


def test_negative_zero_differs_and_nan_equals_itself(tmp_path):
    base, run = run_folder(tmp_path)
    norm = "model.norm.weight"
    for model in (base, run / "model"):
        edit(
            model,
            norm,
            lambda t: t.index_fill(0, torch.tensor([0]), float("nan")).index_fill(0, torch.tensor([1]), 0.0),
        )
    assert audit(base, run).ok
    edit(run / "model", norm, lambda t: t.index_fill(0, torch.tensor([1]), -0.0))
    assert [(d.count, d.positions[0][0]) for d in audit(base, run).outside] == [(1, [1])]


def test_wider_export_is_compared_after_exact_upcast(tmp_path):
    base, run = run_folder(tmp_path, "float32")
    report = audit(base, run)
    assert report.ok
    assert report.changed == {"gate": 64, "down": 32}
    assert "bfloat16 in the base and float32 here: compared after exact upcast" in str(report)
    edit(run / "model", "model.norm.weight", lambda t: t + 1e-6)
    assert audit(base, run).outside[0].count == 32


def test_narrower_export_is_compared_with_the_rounded_base(tmp_path):
    base, run = run_folder(tmp_path, "bfloat16", torch.float32)
    report = audit(base, run)
    assert report.ok
    assert "after rounding the base to bfloat16" in str(report)


def test_without_a_neuron_set_every_difference_is_outside(tmp_path):
    base, run = run_folder(tmp_path)
    report = audit(base, run / "model")
    assert sorted(d.tensor for d in report.outside) == [DOWN, GATE]
    assert "no neuron set" in str(report)
    assert audit(base, run / "model", chosen()).ok


def test_missing_extra_and_misshapen_tensors_fail(tmp_path):
    base, run = run_folder(tmp_path)
    edit(run / "model", GATE, lambda t: t[:47].contiguous())
    report = audit(base, run)
    assert not report.ok
    assert "(48, 32) → (47, 32)" in report.outside[0].tensor
    other = llama(tmp_path / "other")
    for path in other.glob("*.safetensors"):
        if "model.norm.weight" in (stored := load_file(path)):
            stored["model.renamed.weight"] = stored.pop("model.norm.weight")
            save_file(stored, path)
            text = (other / "model.safetensors.index.json").read_text()
            (other / "model.safetensors.index.json").write_text(text.replace("model.norm.", "model.renamed."))
    report = audit(base, other)
    assert (report.missing, report.extra) == (["model.norm.weight"], ["model.renamed.weight"])
    assert not report.ok


def test_bias_entries_belong_to_their_rows(tmp_path):
    torch.manual_seed(0)
    base = tmp_path / "base"
    BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)).save_pretrained(base)
    name, rows = "transformer.h.1.mlp.dense_h_to_4h", torch.tensor([5, 100])
    patches = {
        f"{name}.weight": Patch("row", rows, torch.ones(2, 32)),
        f"{name}.bias": Patch("row", rows, torch.ones(2)),
    }
    export_model(base, patches, tmp_path / "model")
    neurons = NeuronSet({(1, "in", "row"): rows}, 2, {"in": 128, "out": 32}, {"in": 32, "out": 128})
    report = audit(base, tmp_path / "model", neurons)
    assert report.ok
    assert (report.allowed["in"], report.changed["in"]) == (66, 66)
    edit(tmp_path / "model", f"{name}.bias", lambda t: t.index_fill(0, torch.tensor([6]), 2.0))
    assert audit(base, tmp_path / "model", neurons).outside[0].positions == [([6], 0.0, 2.0)]


def test_a_set_of_another_model_is_refused(tmp_path):
    base, run = run_folder(tmp_path)
    deep = NeuronSet({(2, "gate", "row"): torch.tensor([1])}, 3, chosen().widths, chosen().fan_in)
    with pytest.raises(UserError, match="layer 2"):
        audit(base, run, deep)
    wide = NeuronSet({(1, "gate", "row"): torch.tensor([60])}, 2, {"gate": 64}, {"gate": 32})
    with pytest.raises(UserError, match="60"):
        audit(base, run, wide)


def test_the_command_itself(tmp_path):
    base, run = run_folder(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "slicetune.engine", "audit", base, run], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "inside, gate: 64 of 64 weights that may change did (100.0%)" in done.stdout
    assert re.fullmatch(r"PASSED, 3 chosen slices may change: 96 of those 96 .*", done.stdout.splitlines()[-1])
    for words in ([], ["a", "b", "c"]):
        with pytest.raises(SystemExit, match="2"):
            main(["audit", *words])
    with pytest.raises(SystemExit) as stop:
        main(["audit", str(tmp_path)])
    assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        main(["audit", str(base), str(tmp_path / "nowhere")])
    assert stop.value.code == 2


def trained_run(tmp_path: Path, method: Method) -> tuple[Path, Path]:
    """A run's folder as the method leaves it, of masters moved by hand."""
    base, run = llama(tmp_path / "base"), tmp_path / "run"
    run.mkdir()
    config = RunConfig(method=method)
    config.model.path = str(base)
    (run / "config.json").write_text(json.dumps(as_dict(config)))
    live = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    method.prepare(live, None)
    masters = {f"master/{name}": p.detach() + 0.25 for name, p in live.named_parameters() if p.requires_grad}
    expansion = method.expansion(2)
    export_model(base, method.patches(base, None, masters), run / "model", expansion=expansion)
    return base, run


PER_BLOCK = {"q_proj": 1024, "k_proj": 1024, "v_proj": 1024, "o_proj": 1024}
MLP = {"gate_proj": 1536, "up_proj": 1536, "down_proj": 1536}


@pytest.mark.parametrize(
    ("method", "layers"), [(Lora(rank=2), PER_BLOCK | MLP), (Dora(rank=2), PER_BLOCK | MLP), (LoraMlp(rank=2), MLP)]
)
def test_adapters_change_the_layers_that_they_were_merged_into(method, layers, tmp_path, capsys):
    _, run = trained_run(tmp_path, method)
    assert main(["audit", str(run)]) == 0  # the base is the run's own
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict.startswith(f"PASSED, {method.title}: {2 * len(layers)} layers that it was merged into may change: ")
    report = audit(tmp_path / "base", run)
    assert report.allowed == {name: 2 * size for name, size in layers.items()}
    assert all(report.changed[name] > 0.9 * size for name, size in report.allowed.items())
    other = (
        "model.layers.1.self_attn.o_proj.weight"
        if method.kind == "lora_mlp"
        else "model.layers.1.input_layernorm.weight"
    )
    edit(run / "model", other, lambda t: t.index_fill(0, torch.tensor([3]), 0.5))
    assert [d.tensor for d in audit(tmp_path / "base", run).outside] == [other]


def test_llama_pro_keeps_the_old_blocks_and_sets_the_new_ones_apart(tmp_path, capsys):
    _, run = trained_run(tmp_path, LlamaPro(blocks=2))
    report = audit(tmp_path / "base", run)
    assert report.ok
    block = 4 * 1024 + 3 * 1536 + 2 * 32
    assert (report.new_weights, len(report.new)) == (2 * block, 18)
    assert {name.split(".")[2] for name in report.new} == {"1", "3"}  # block 1 of the base is block 2 now
    assert main(["audit", str(run)]) == 0
    out = capsys.readouterr().out
    assert f"  new: {2 * block:,} weights in 18 tensors" in out
    assert "PASSED, LLaMA Pro: 2 new blocks, nothing of the base may change: 0 of those 0 weights" in out
    edit(run / "model", "model.layers.1.mlp.up_proj.weight", lambda t: t + 1)  # a new block's
    assert audit(tmp_path / "base", run).ok
    edit(run / "model", "model.layers.2.mlp.up_proj.weight", lambda t: t.index_fill(0, torch.tensor([3]), 0.5))
    assert [d.tensor for d in audit(tmp_path / "base", run).outside] == ["model.layers.2.mlp.up_proj.weight"]
    assert main(["audit", str(run)]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("FAILED, LLaMA Pro: ")


def test_full_says_that_it_proves_nothing(tmp_path):
    base, run = trained_run(tmp_path, Full())
    report = audit(base, run)
    assert report.ok
    assert report.changed.total() == report.allowed.total() == report.weights
    assert "PASSED, Full: everything may change, so there is nothing to prove: " in str(report)
    edit(run / "model", "model.norm.weight", lambda t: t[:31].contiguous())
    assert not audit(base, run).ok  # but shapes are the base's


@pytest.mark.parametrize(
    ("method", "words"), [(Base(), "Base trains nothing"), (Adapter(), "Adapter keeps what it trained in attached/")]
)
def test_a_run_without_a_model_of_its_own_is_said_to_be_one(method, words, tmp_path):
    base = llama(tmp_path / "base")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(as_dict(RunConfig(method=method))))
    with pytest.raises(UserError, match=words):
        audit(base, tmp_path / "run")
