"""The audit of a run: what `from_pretrained` loads is the model that was trained, its config and tokenizer included."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import toys
from safetensors.torch import load_file, save_file
from transformers import Phi3Config, Phi3ForCausalLM

from slicetune.engine.common import checkpoint
from slicetune.engine.common.checkpoint import MASTER
from slicetune.engine.common.settings import as_dict
from slicetune.engine.export import live
from slicetune.engine.export.audit import audit
from slicetune.engine.export.live import CHOSEN
from slicetune.engine.export.model import export_model
from slicetune.engine.export.streamed import hollow
from slicetune.engine.methods.base import Full
from slicetune.engine.methods.landermt.patches import trained as trained_routes
from slicetune.engine.methods.landermt.settings import Landermt
from slicetune.engine.methods.lape import Lape
from slicetune.engine.methods.llama_pro import LlamaPro
from slicetune.engine.methods.lora import Dora, Lora
from slicetune.engine.methods.method import Method
from slicetune.engine.run.config import RunConfig
from slicetune.engine.slices.neurons import NeuronSet

UP = "model.layers.1.mlp.gate_up_proj.weight"
UNITS = torch.tensor([2, 40])


def phi3(folder: Path, dtype: torch.dtype) -> Path:
    """A packed model that is chatty in its config: a window, an end token, a tokenizer's file."""
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        sliding_window=512,
        initializer_range=0.2,
    )
    model = Phi3ForCausalLM(config).to(dtype)
    model.generation_config.eos_token_id = [2, 5]
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def run_of(tmp_path: Path, method: Method, base_dtype: torch.dtype, export: str = "auto") -> tuple[Path, Path]:
    """A run's folder as the method leaves it, with the checkpoint that it exported."""
    base, run = phi3(tmp_path / "base", base_dtype), tmp_path / "run"
    run.mkdir()
    config = RunConfig(method=method)
    config.model.path = str(base)
    (run / "config.json").write_text(json.dumps(as_dict(config)))
    widths, fan_in = {"gate": 48, "up": 48, "down": 32}, {"gate": 32, "up": 32, "down": 48}
    slices = {(1, "gate", "row"): UNITS, (1, "up", "row"): UNITS, (1, "down", "column"): UNITS}
    chosen = NeuronSet(slices, 2, widths, fan_in) if method.selects else None
    if chosen:
        chosen.save(run / "neurons.safetensors")
    live = Phi3ForCausalLM.from_pretrained(base, dtype=torch.float32)
    method.prepare(live, chosen)
    draw = torch.Generator().manual_seed(0)
    moved = {n: p.detach() + 0.01 * torch.randn(p.shape, generator=draw) for n, p in live.named_parameters()}
    masters = {MASTER + n: moved[n] for n, p in live.named_parameters() if p.requires_grad}
    checkpoint.save(run / "checkpoints/step-1", masters, {"step": 1})
    (run / CHOSEN).write_text(json.dumps({"checkpoint": "checkpoints/step-1"}))
    export_model(
        base, method.patches(base, chosen, masters), run / "model", export, method.expansion(2), ends=[2, 5, 7]
    )
    return base, run


@pytest.mark.parametrize(
    "method", [Lape(), Full(), LlamaPro(blocks=1), Lora(rank=2), Dora(rank=2)], ids=lambda m: m.kind
)
@pytest.mark.parametrize(
    ("base_dtype", "export"), [("bfloat16", "auto"), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_a_right_export_never_fails(method, base_dtype, export, tmp_path):
    base, run = run_of(tmp_path, method, getattr(torch, base_dtype), export)
    report = audit(base, run)
    assert report.ok, str(report)
    assert not report.likeness.why_not
    assert report.likeness.deviation < 0.2 * report.likeness.limit


def edit_tensor(model: Path, change) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors[UP])
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("row", [40, 48 + 40])
def test_one_value_within_the_chosen_rows_that_is_not_the_checkpoints_is_found(dtype, row, tmp_path):
    base, run = run_of(tmp_path, Lape(), dtype)
    edit_tensor(run / "model", lambda t: t[row].mul_(1.01))
    report = audit(base, run)
    assert not report.ok
    assert report.untrained == [UP]
    assert f"NOT AS TRAINED, {UP}" in str(report)
    assert str(report).splitlines()[-1].endswith(": the export is not the model that was trained")


def test_a_merged_layer_that_was_changed_shows_in_the_logits(tmp_path):
    base, run = run_of(tmp_path, Lora(rank=2), torch.float32)
    edit_tensor(run / "model", lambda t: t[40].mul_(1.05))
    report = audit(base, run)
    assert (report.ok, report.likeness.ok) == (False, False)


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("config.json", {"rms_norm_eps": 1e-3}, "config.json: rms_norm_eps is 0.001, the base's 1e-05"),
        ("config.json", {"sliding_window": 64}, "config.json: sliding_window is 64, the base's 512"),
        ("generation_config.json", {"eos_token_id": [2, 7]}, "generation_config.json: eos_token_id lacks 5"),
        ("generation_config.json", {"repetition_penalty": 1.3}, "generation_config.json is not the base's"),
        ("tokenizer.json", {"added_tokens": []}, "tokenizer.json is not the base's"),
    ],
)
def test_what_lies_beside_the_weights_must_be_the_bases(file, values, words, tmp_path):
    base, run = run_of(tmp_path, Lape(), torch.float32)
    edit_json(run / "model" / file, **values)
    report = audit(base, run)
    assert not report.ok
    assert f"  BESIDE the weights, {words}" in str(report)
    assert str(report).splitlines()[-1].endswith(": files beside the weights differ")


def test_a_config_that_another_version_wrote_is_the_same_one(tmp_path):
    base, run = run_of(tmp_path, Lape(), torch.float32)
    model = Phi3ForCausalLM.from_pretrained(run / "model")
    model.config.use_cache = False
    model.save_pretrained(tmp_path / "saved", max_shard_size="10KB")
    neurons = NeuronSet.load(run / "neurons.safetensors")
    assert audit(base, tmp_path / "saved", neurons).ok
    edit_json(tmp_path / "saved/config.json", num_key_value_heads=2)
    assert "num_key_value_heads is 2, the base's 4" in str(audit(base, tmp_path / "saved", neurons))


def test_a_base_that_has_moved_is_given_by_hand(tmp_path):
    base, run = run_of(tmp_path, Lape(), torch.float32)
    base.rename(tmp_path / "elsewhere")
    assert audit(tmp_path / "elsewhere", run).ok


def test_without_the_checkpoint_the_audit_says_that_nothing_was_compared(tmp_path):
    base, run = run_of(tmp_path, Lape(), torch.float32)
    folder = run / json.loads((run / CHOSEN).read_text())["checkpoint"]
    (folder / "manifest.json").write_text("{}")
    assert "whose checkpoint cannot be read: " in str(audit(base, run))
    shutil.rmtree(folder)
    report = audit(base, run)
    assert report.ok
    assert "logits: not compared with the trained model, whose checkpoint is not there any more" in str(report)


METHODS = [Lape(), Full(), LlamaPro(blocks=1), Lora(rank=2), Dora(rank=2)]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.kind)
@pytest.mark.parametrize(("dtype", "export"), [("bfloat16", "auto"), ("float32", "auto"), ("float32", "bfloat16")])
def test_a_model_that_is_read_while_it_computes_gives_the_same_logits(method, dtype, export, tmp_path, monkeypatch):
    base, run = run_of(tmp_path, method, getattr(torch, dtype), export)
    seen, logits = [], live._logits
    monkeypatch.setattr(live, "_logits", lambda model: seen.append(logits(model)) or seen[-1])
    whole = live.compare(base, run, method)
    monkeypatch.setattr(live, "WHOLE", 0.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    streamed = live.compare(base, run, method)
    assert (whole.streamed, streamed.streamed) == (False, True)
    assert (whole.why_not, streamed.why_not) == ("", "")
    assert streamed.ok
    for one, other in zip(seen[:2], seen[2:], strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-5)
    assert str(streamed).endswith("as loaded by from_pretrained, both read from the disk block by block")


def routed_run(tmp_path: Path, kind: str) -> tuple[Path, Path, Landermt]:
    """A LANDeRMT run's folder: its routes, the checkpoint that it exported, with learned shares, and its model."""
    made = {"llama": toys.model, "bloom": toys.bloom}[kind]()
    units = {"llama": toys.INTERMEDIATE, "bloom": 4 * toys.HIDDEN}[kind]
    base, run, method = tmp_path / "base", tmp_path / "run", Landermt(attention=True)
    made.save_pretrained(base)
    routes = toys.routes(units, car="learned")
    run.mkdir()
    routes.save(run / method.chosen_file)
    method.prepare(made, routes, groups=routes.pairs)
    draw = torch.Generator().manual_seed(0)
    trained = {n: p.detach() for n, p in made.named_parameters() if p.requires_grad}
    masters = {MASTER + n: p + 0.1 * torch.randn(p.shape, generator=draw) for n, p in trained.items()}
    checkpoint.save(run / "checkpoints/step-1", masters, {"step": 1})
    (run / CHOSEN).write_text(json.dumps({"checkpoint": "checkpoints/step-1"}))
    export_model(base, method.patches(base, routes, masters), run / "model")
    trained_routes(base, routes, masters).save(run / "model" / method.chosen_file)
    return base, run, method


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_a_routed_model_that_is_read_while_it_computes(kind, tmp_path, monkeypatch):
    base, run, method = routed_run(tmp_path, kind)
    seen, logits = [], live._logits
    monkeypatch.setattr(live, "_logits", lambda model: seen.append(logits(model)) or seen[-1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert live.compare(base, run, method).ok
    monkeypatch.setattr(live, "WHOLE", 0.0)
    streamed = live.compare(base, run, method)
    assert (streamed.ok, streamed.streamed, streamed.why_not) == (True, True, "")
    assert all(torch.allclose(seen[0], other, rtol=0, atol=1e-5) for other in seen[1:])


def test_an_old_buffer_that_is_stored_is_computed(tmp_path):
    made, name = toys.model(), "model.rotary_emb.inv_freq"
    want = made.get_buffer(name).clone()
    made.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {name: torch.zeros_like(want)}, file, {"format": "pt"})
    assert torch.equal(hollow(tmp_path, torch.float32).model.get_buffer(name), want)


def test_a_wrong_export_is_found_while_it_is_read(tmp_path, monkeypatch):
    base, run = run_of(tmp_path, Lora(rank=2), torch.float32)
    edit_tensor(run / "model", lambda t: t[40].mul_(1.05))
    monkeypatch.setattr(live, "WHOLE", 0.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = live.compare(base, run, Lora(rank=2))
    assert (found.streamed, found.ok) == (True, False)
    assert "NOT THE TRAINED MODEL'S" in str(found)


def test_a_model_whose_layers_cannot_be_read_one_by_one_is_not_compared(tmp_path, monkeypatch):
    base, run = run_of(tmp_path, Lape(), torch.float32)
    monkeypatch.setattr(live, "WHOLE", 0.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    real = Phi3ForCausalLM.forward

    def borrows(self, *args, **kwargs):  # a weight of a block that is not at work
        out = real(self, *args, **kwargs)
        out.logits = out.logits + self.model.layers[0].mlp.down_proj.weight.sum()
        return out

    monkeypatch.setattr(Phi3ForCausalLM, "forward", borrows)
    found = live.compare(base, run, Lape())
    assert found.ok
    assert "not compared with the trained model, whose " in str(found)


def test_where_a_model_is_held(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert (live._room(memory // 4), live._room(memory // 4 + 1)) == ("cpu", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (memory, memory))
    assert (live._room(memory // 2), live._room(memory)) == ("cuda", "")
