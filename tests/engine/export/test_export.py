"""Exporting: untouched bytes stay, patches land where they belong, and what cannot be exported is refused."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from slicetune.engine.common.errors import UserError
from slicetune.engine.common.shards import match_names, tensor_files
from slicetune.engine.export import model as module
from slicetune.engine.export.model import export_model, summary
from slicetune.engine.slices.patches import Patch

UP = "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


def llama(folder: Path, dtype: torch.dtype = torch.bfloat16, shard: str = "12KB") -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer_config.json").write_text('{"a": "ü"}')
    (folder / "README.md").write_text("the base's model card")
    (folder / "optimizer.bin").write_bytes(b"pickle")
    return folder


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for shard in sorted(folder.glob("*.safetensors")) for k, v in load_file(shard).items()}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def test_without_patches_every_file_comes_out_byte_for_byte(tmp_path):
    base = llama(tmp_path / "base")
    assert len(list(base.glob("*.safetensors"))) > 2
    result = export_model(base, {}, tmp_path / "out" / "model")
    ours, theirs = hashes(tmp_path / "out" / "model"), hashes(base)
    assert set(theirs) - set(ours) == {"README.md", "optimizer.bin"}
    index = "model.safetensors.index.json"
    assert {k: v for k, v in ours.items() if k != index} == {k: theirs[k] for k in ours if k != index}
    weight_maps = [json.loads((f / index).read_text())["weight_map"] for f in (base, tmp_path / "out" / "model")]
    assert weight_maps[0] == weight_maps[1]
    assert result["changed"] == result["patched"] == result["lost"] == 0
    assert result["dtype"] == "bfloat16"


def test_logits_equal_the_live_patched_model_and_only_patched_bytes_change(tmp_path):
    base = llama(tmp_path / "base", torch.float32)
    live = AutoModelForCausalLM.from_pretrained(base)
    rows, columns = torch.tensor([3, 47]), torch.tensor([0, 20, 31])
    patches = {
        UP: Patch("row", rows, torch.randn(2, 32)),
        DOWN: Patch("column", columns, torch.randn(3, 32)),
        "lm_head.weight": Patch(None, None, torch.randn(64, 32)),
    }
    before = logits(live)
    with torch.no_grad():
        live.get_parameter(UP)[rows] = patches[UP].values
        live.get_parameter(DOWN)[:, columns] = patches[DOWN].values.t()
        live.get_parameter("lm_head.weight").copy_(patches["lm_head.weight"].values)
    result = export_model(base, patches, tmp_path / "model")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(exported), logits(live))
    assert not torch.allclose(logits(exported), before)
    assert result["patched"] == result["changed"] == result["updated"] == 2 * 32 + 3 * 32 + 64 * 32
    old, new = tensors(base), tensors(tmp_path / "model")
    assert {name for name in old if not torch.equal(old[name], new[name])} == set(patches)
    untouched = [i for i in range(48) if i not in (3, 47)]
    assert torch.equal(old[UP][untouched], new[UP][untouched])


def test_bloom_file_keys_without_prefix_and_bias_rows(tmp_path):
    torch.manual_seed(0)
    BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)).save_pretrained(tmp_path / "full")
    stored = {k.removeprefix("transformer."): v for k, v in tensors(tmp_path / "full").items()}
    base = tmp_path / "base"  # as bigscience published it: no prefix, and no lm_head, which is tied
    base.mkdir()
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_bytes((tmp_path / "full" / "config.json").read_bytes())
    name = "transformer.h.1.mlp.dense_h_to_4h"
    patches = {
        f"{name}.weight": Patch("row", torch.tensor([5, 100]), torch.randn(2, 32)),
        f"{name}.bias": Patch("row", torch.tensor([5, 100]), torch.randn(2)),
    }
    live = AutoModelForCausalLM.from_pretrained(base)
    before = logits(live)
    with torch.no_grad():
        for key, patch in patches.items():
            live.get_parameter(key)[patch.index] = patch.values
    export_model(base, patches, tmp_path / "model")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(exported), logits(live))
    assert not torch.allclose(logits(exported), before)
    assert not (tmp_path / "model" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize(("step", "lost"), [(1e-6, 1.0), (1.0, 0.0)])
def test_updates_that_bf16_rounding_swallows_are_counted(tmp_path, step, lost):
    base = llama(tmp_path / "base")
    stored = tensors(base)[UP]
    values = stored[:4].float().sign() * (stored[:4].float().abs().clamp_min(0.01) + step)
    patches = {UP: Patch("row", torch.arange(4), values)}
    moved = int((values != stored[:4].float()).sum())
    survived = int((values.bfloat16() != stored[:4]).sum())
    result = export_model(base, patches, tmp_path / "auto")
    assert (result["patched"], result["updated"], result["changed"]) == (128, moved, survived)
    assert result["lost"] == pytest.approx(1 - survived / moved)
    if step == 1e-6:
        assert 0.5 < result["lost"] < 1  # the weights below 0.01 moved far
        assert "--evaluate.dtype float32" in summary(result)
    else:
        assert result["lost"] == lost
        assert "WARNING" not in summary(result)
    exact = export_model(base, patches, tmp_path / "wide", "float32")
    assert (exact["changed"], exact["lost"], exact["dtype"]) == (moved, 0.0, "float32")
    assert torch.equal(tensors(tmp_path / "wide")[UP][:4], values)


@pytest.mark.parametrize(("base_dtype", "wanted"), [(torch.bfloat16, "float32"), (torch.float32, "bfloat16")])
def test_cast_reaches_every_tensor_and_the_config(tmp_path, base_dtype, wanted):
    base = llama(tmp_path / "base", base_dtype)
    export_model(base, {}, tmp_path / "model", wanted)
    old, new = tensors(base), tensors(tmp_path / "model")
    assert all(torch.equal(old[k].to(getattr(torch, wanted)), new[k]) for k in old)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == wanted
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").dtype == getattr(torch, wanted)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in new.values())


def test_mixed_dtypes_stay_aligned_and_integers_are_not_cast(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    stored = {"a": torch.arange(5, dtype=torch.int64), "b": torch.randn(3).bfloat16(), "c": torch.tensor([True, False])}
    stored["d"] = torch.tensor(2.5, dtype=torch.float16)
    save_file(stored, base / "model.safetensors")
    export_model(base, {}, tmp_path / "out", "float32")
    new = load_file(tmp_path / "out" / "model.safetensors")
    assert {k: v.dtype for k, v in new.items()} == {
        "a": torch.int64,
        "b": torch.float32,
        "c": torch.bool,
        "d": torch.float32,
    }
    assert all(torch.equal(new[k], stored[k].to(new[k].dtype)) for k in stored)


def test_a_narrower_export_keeps_wider_integers_aligned(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    stored = {"w": torch.randn(3), "i": torch.arange(2, dtype=torch.int32)}
    save_file(stored, base / "model.safetensors")
    export_model(base, {}, tmp_path / "out", "bfloat16")
    new = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(new["i"], stored["i"])
    assert torch.equal(new["w"], stored["w"].bfloat16())
    header = (tmp_path / "out" / "model.safetensors").read_bytes()[8:].split(b"}}")[0] + b"}}"
    assert json.loads(header)["i"]["data_offsets"] == [0, 8]


def test_rounding_alone_does_not_count_as_a_change(tmp_path):
    base = llama(tmp_path / "base", torch.float32)
    same = tensors(base)[UP][:4].clone()
    result = export_model(base, {UP: Patch("row", torch.arange(4), same)}, tmp_path / "model", "bfloat16")
    assert (result["patched"], result["updated"], result["changed"], result["lost"]) == (128, 0, 0, 0.0)


def test_older_configs_name_the_dtype_in_two_places(tmp_path):
    old = {"torch_dtype": "float16", "text_config": {"torch_dtype": "float16", "x": 1}, "dtype_of_else": 3}
    new = module._with_dtype(old, "float32")
    assert new == {"torch_dtype": "float32", "text_config": {"torch_dtype": "float32", "x": 1}, "dtype_of_else": 3}


def test_failed_export_leaves_the_previous_one_and_no_rest(tmp_path, monkeypatch):
    base, out = llama(tmp_path / "base"), tmp_path / "run" / "model"
    export_model(base, {}, out)
    before = hashes(out)
    (tmp_path / "run" / ".model.unfinished").mkdir()  # what a kill left
    (tmp_path / "run" / ".model.unfinished" / "model-00001-of-00009.safetensors").write_text("half")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        export_model(base, {UP: Patch("row", torch.tensor([0]), torch.ones(1, 32))}, out)
    monkeypatch.undo()
    assert hashes(out) == before
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    export_model(base, {UP: Patch("row", torch.tensor([0]), torch.ones(1, 32))}, out)
    assert torch.equal(tensors(out)[UP][0].float(), torch.ones(32))
    assert [path.name for path in out.parent.iterdir()] == ["model"]


def test_targets_that_must_not_be_replaced(tmp_path):
    base = llama(tmp_path / "base")
    with pytest.raises(UserError, match="replace its own base"):
        export_model(base, {}, base)
    with pytest.raises(UserError, match="replace its own base"):
        export_model(base, {}, tmp_path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(UserError, match="not replaced"):
        export_model(base, {}, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("name", "patch", "message"),
    [
        ("model.layers.2.mlp.up_proj.weight", Patch("row", torch.tensor([0]), torch.ones(1, 32)), "no tensor of that"),
        (UP, Patch("row", torch.tensor([48]), torch.ones(1, 32)), "slice 48 of 48"),
        (UP, Patch("column", torch.tensor([0]), torch.ones(1, 32)), "do not fit"),
        (UP, Patch(None, None, torch.ones(48, 31)), "do not fit"),
        (UP, Patch("row", torch.tensor([0]), torch.full((1, 32), float("nan"))), "not finite"),
        (UP, Patch("row", torch.tensor([0]), torch.full((1, 32), 3.4e38)), "not finite"),
    ],
)
def test_patches_that_do_not_fit_are_refused(tmp_path, name, patch, message):
    base = llama(tmp_path / "base")
    with pytest.raises(UserError, match=message):
        export_model(base, {name: patch}, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def edit_index(base: Path, shard: str) -> None:
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][UP] = shard
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("shard", ["../model-00001-of-00002.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_shards_outside_the_folder_are_refused(tmp_path, shard):
    base = llama(tmp_path / "base")
    edit_index(base, shard)
    with pytest.raises(UserError, match="points outside the folder"):
        export_model(base, {}, tmp_path / "model")


def test_broken_folders_are_refused_in_one_line(tmp_path):
    base = llama(tmp_path / "base")
    first, second, *_ = sorted(base.glob("*.safetensors"))
    edit_index(base, "model-00077-of-00099.safetensors")
    with pytest.raises(UserError, match="is missing: download"):
        tensor_files(base)
    edit_index(base, "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \.safetensors file: convert"):
        tensor_files(base)
    with safe_open(first, "pt") as shard:
        assert UP not in set(shard.keys())
    edit_index(base, first.name)
    with pytest.raises(UserError, match="is not in"):
        tensor_files(base)
    (base / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    with pytest.raises(UserError, match="no weight_map"):
        tensor_files(base)
    second.rename(base / "model.safetensors")
    os.truncate(base / "model.safetensors", 900)
    with pytest.raises(UserError, match="not a readable safetensors") as caught:
        tensor_files(base)
    assert "\n" not in str(caught.value)


def test_pickle_only_folders_say_how_to_convert(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="save_pretrained"):
        tensor_files(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither"):
        tensor_files(tmp_path / "empty")
    with pytest.raises(UserError, match="is no folder on this machine"):
        tensor_files(tmp_path / "nothing")


def test_names_match_by_the_longest_suffix():
    keys = ["h.0.mlp.up.weight", "h.1.mlp.up.weight", "h.11.mlp.up.weight", "norm.weight", "h.1.norm.weight"]
    assert match_names(["transformer.h.1.mlp.up.weight"], keys) == {"transformer.h.1.mlp.up.weight": keys[1]}
    assert match_names(["model.norm.weight"], keys) == {"model.norm.weight": "norm.weight"}
    nested = ["model.language_model.layers.3.mlp.up.weight", "model.vision.blocks.3.mlp.up.weight"]
    name = "language_model.model.layers.3.mlp.up.weight"
    assert match_names([name], nested) == {name: nested[0]}
    nested = ["vision.layers.3.mlp.up.weight", "text.model.layers.3.mlp.up.weight"]
    assert match_names([name], nested) == {name: nested[1]}  # both reach back to `layers`; one shares `model` too
    with pytest.raises(UserError, match="no tensor"):  # the final norm is not layer 0's
        match_names(["transformer.h.0.norm.weight"], keys)
    with pytest.raises(UserError, match="no tensor"):
        match_names(["lm_head.weight"], keys)
    with pytest.raises(UserError, match="alike"):
        match_names(["layers.3.up.weight"], ["text.layers.3.up.weight", "vision.layers.3.up.weight"])
    with pytest.raises(UserError, match="both fit"):
        match_names(["a.h.1.up.weight", "b.h.1.up.weight"], ["h.1.up.weight"])
