"""The slice delta restores the bits; the adapter made of it gives PEFT the merged model's logits."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
import toys
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from slicetune.engine import commands
from slicetune.engine.common.errors import UserError
from slicetune.engine.export import adapter, delta
from slicetune.engine.export.model import export_model
from slicetune.engine.methods.lora import Dora, Lora
from slicetune.engine.slices.patches import Patch

NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def patches() -> dict[str, Patch]:
    """Rows of one layer, rows and columns of the other, moved by a little."""
    neurons = toys.neurons(**{"0.gate.row": [1, 5, 47], "1.up.row": [9], "1.down.column": [0, 3, 11, 40]})
    weights, made = dict(toys.model().named_parameters()), {}
    for (layer, role, axis), index in neurons.slices.items():
        name = f"model.layers.{layer}.mlp.{NAMES[role]}.weight"
        old = weights[name].detach()[index] if axis == "row" else weights[name].detach()[:, index].t()
        made[name] = Patch(axis, index, old + 0.3 * torch.randn(old.shape))
    return made


def bytes_of(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture(params=[("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "float32")], ids="-".join)
def exported(request, tmp_path):
    stored, dtype = request.param
    toys.model(dtype=getattr(torch, stored)).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    export_model(tmp_path / "base", patches(), tmp_path / "model", dtype)
    delta.write(tmp_path / "base", tmp_path / "model", patches(), tmp_path / "delta")
    return tmp_path


def test_apply_gives_the_export_and_subtract_the_base(exported):
    delta.apply(exported / "base", exported / "delta", exported / "applied")
    assert bytes_of(exported / "applied") == bytes_of(exported / "model")
    delta.subtract(exported / "applied", exported / "delta", exported / "restored")
    base, restored = bytes_of(exported / "base"), bytes_of(exported / "restored")
    assert {n: h for n, h in base.items() if n.endswith("safetensors")} == {
        n: h for n, h in restored.items() if n.endswith("safetensors")
    }
    assert len(base) > 3
    about = json.loads((exported / "delta" / "delta.json").read_text())
    assert about["weights"] == 4 * toys.HIDDEN + 4 * toys.HIDDEN


def test_a_delta_of_another_model_is_refused(exported, capsys):
    with pytest.raises(UserError, match="does not hold the delta's old values"):
        delta.apply(exported / "model", exported / "delta", exported / "twice")
    with pytest.raises(UserError, match="does not hold the delta's new values"):
        delta.subtract(exported / "base", exported / "delta", exported / "none")
    with pytest.raises(UserError, match="not a slice delta"):
        delta.apply(exported / "base", exported / "model", exported / "none")
    assert not (exported / "twice").exists()
    assert (
        commands.main(["delta", "apply", str(exported / "base"), str(exported / "delta"), str(exported / "by-hand")])
        == 0
    )
    assert bytes_of(exported / "by-hand") == bytes_of(exported / "model")
    with pytest.raises(SystemExit, match="2"):
        commands.main(["delta", "apply", str(exported / "base"), str(exported / "base"), str(exported / "x")])
    assert "not a slice delta" in capsys.readouterr().err


def test_a_changed_description_is_refused(exported):
    path = exported / "delta" / "delta.json"
    path.write_text(path.read_text().replace('"new_dtype"', '"new_dtype" '))  # other spaces are the same description
    delta.apply(exported / "base", exported / "delta", exported / "applied")
    path.write_text(path.read_text().replace("mlp.", "mpl."))
    with pytest.raises(UserError, match=r"delta\.json: is not what was written with delta\.safetensors; delete"):
        delta.apply(exported / "base", exported / "delta", exported / "again")
    assert not (exported / "again").exists()


@pytest.mark.parametrize("own_ranks", [True, False], ids=["ranks", "one_rank"])
def test_adapter_gives_peft_the_merged_models_logits(own_ranks, exported, capsys):
    adapter.write(exported / "delta", str(exported / "base"), exported / "adapter", own_ranks)
    line = capsys.readouterr().out
    loaded, merged = with_adapter(exported)
    assert (loaded - merged).abs().max() < 1e-5
    plain = logits(AutoModelForCausalLM.from_pretrained(exported / "base", dtype=torch.float32))
    assert (merged - plain).abs().max() > 1e-2
    ranks = [3, 1, 4] if own_ranks else [4, 4, 4]
    stored = load_file(exported / "adapter" / "adapter_model.safetensors")
    assert sum(value.numel() for value in stored.values()) == sum(ranks) * (toys.HIDDEN + toys.INTERMEDIATE)
    assert f"{4 * sum(ranks) * (toys.HIDDEN + toys.INTERMEDIATE) / 1e6:.1f} MB" in line


def base_and(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32), folder / "adapter"


def with_adapter(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    loaded = PeftModel.from_pretrained(*base_and(folder))
    return logits(loaded), logits(AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32))


def logits(model) -> torch.Tensor:
    ids = torch.tensor([toys.examples(1)[0].input_ids])
    with torch.no_grad():
        return model.eval()(ids).logits


def test_above_rank_512_vllm_is_named():
    assert "vLLM refuses ranks above 512" in adapter.size_line({"w": (513, [4096, 4096])})
    line = "adapter: 1 layers, largest rank 512, 16.8 MB; vLLM serves it with --max-lora-rank 512"
    assert adapter.size_line({"w": (512, [4096, 4096])}) == line
    assert adapter.size_line({"w": (33, [8, 8]), "v": (2, [8, 8])}).endswith("--max-lora-rank 64")


def test_a_trained_bias_is_no_adapter(tmp_path):
    (tmp_path / "delta.json").write_text(
        json.dumps({"format": delta.FORMAT, "tensors": {"h.0.mlp.bias": {"module": "h.0.mlp", "shape": [4]}}})
    )
    with pytest.raises(UserError, match="trained bias"):
        adapter.write(tmp_path, "base", tmp_path / "adapter", True)


@pytest.mark.parametrize("method", [Lora(rank=3), Dora(rank=3)], ids=lambda method: method.kind)
def test_a_lora_runs_own_adapter(method, tmp_path):
    toys.model().save_pretrained(tmp_path / "base")
    live = toys.model()
    method.prepare(live, None)
    tensors = {f"master/{n}": torch.randn_like(p) for n, p in live.named_parameters() if p.requires_grad}
    export_model(tmp_path / "base", method.patches(tmp_path / "base", None, tensors), tmp_path / "model")
    adapter.write_lora(method, tensors, str(tmp_path / "base"), tmp_path / "adapter")
    loaded, merged = with_adapter(tmp_path)
    assert (loaded - merged).abs().max() < 1e-4 * merged.abs().max()
    kept = get_peft_model_state_dict(PeftModel.from_pretrained(*base_and(tmp_path)))
    assert len(kept) == len(tensors)
