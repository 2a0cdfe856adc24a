"""Model folders from strangers: each refused in one line, before a tensor is read; nothing of theirs is run."""

from __future__ import annotations

import ast
import json
import os
import pickle
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import toys
from jobs import ROOT
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from slicetune.engine.common.errors import UserError
from slicetune.engine.models import folders
from slicetune.engine.models import load as models
from slicetune.engine.models.config import ModelConfig

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A sound toy of two shards."""
    toys.model().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    models.snapshot(str(tmp_path / "model"))
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def nothing_is_read(monkeypatch, request):
    """Headers may be read, tensors not; and no pickle is opened."""
    if "loads" in request.keywords:
        return

    def refused(*args, **kwargs):
        raise AssertionError("a tensor or a pickle was read")

    monkeypatch.setattr("slicetune.engine.common.shards.Shard.read", refused)
    monkeypatch.setattr(torch, "load", refused)
    monkeypatch.setattr(pickle, "load", refused)


def edit(path: Path, **changes) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


def index(folder: Path) -> Path:
    return folder / "model.safetensors.index.json"


def point(folder: Path, shard: object) -> None:
    """The index's first tensor is said to lie in `shard`."""
    listed = json.loads(index(folder).read_text())["weight_map"]
    edit(index(folder), weight_map=listed | {next(iter(listed)): shard})


class Evil:
    ran = False

    def __reduce__(self):
        return (setattr, (Evil, "ran", True))


def pickled(folder: Path) -> None:
    for path in (*folder.glob("*.safetensors"), index(folder)):
        path.unlink()
    torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")


def pickled_behind_a_decoy(folder: Path) -> None:
    """transformers would take the pickle: model.safetensors is not there, another .safetensors is."""
    pickled(folder)
    save_file({"a": torch.ones(2)}, folder / "adapter.safetensors")


def header(folder: Path, length: int, text: bytes = b"") -> None:
    path = next(iter(sorted(folder.glob("*.safetensors"))))
    path.write_bytes(struct.pack("<Q", length) + text)


def mixtral(folder: Path) -> None:
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    for path in folder.iterdir():
        path.unlink()
    MixtralForCausalLM(config).save_pretrained(folder)


def shape(folder: Path) -> None:
    edit(folder / "config.json", intermediate_size=64)


def drop(folder: Path) -> None:
    """A shard without one of its tensors, and an index that agrees: transformers would make one up."""
    listed = json.loads(index(folder).read_text())["weight_map"]
    name, shard = next((n, s) for n, s in listed.items() if "up_proj" in n)
    tensors = load_file(folder / shard)
    del tensors[name], listed[name]
    save_file(tensors, folder / shard)
    edit(index(folder), weight_map=listed)


FAULTS = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), "not JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
    "config of 101 MB": (lambda f: os.truncate(f / "config.json", 101_000_000), "larger than 100 MB"),
    "config nests": (lambda f: (f / "config.json").write_text("[" * 100_000), "not JSON"),
    "remote code": (lambda f: edit(f / "config.json", auto_map={"AutoModel": "evil.Model"}), "auto_map"),
    "remote tokenizer": (lambda f: (f / "tokenizer_config.json").write_text('{"auto_map": {}}'), "auto_map"),
    "unknown architecture": (lambda f: edit(f / "config.json", model_type="evil"), "no model_type 'evil'"),
    "no architecture": (lambda f: edit(f / "config.json", model_type=None), "no model_type None"),
    "mixture of experts": (mixtral, "MixtralForCausalLM is a mixture of experts"),
    "unknown activation": (lambda f: edit(f / "config.json", hidden_act="evil"), "evil"),
    "a billion layers": (lambda f: edit(f / "config.json", num_hidden_layers=10**9), "1000000000 layers"),
    "no layers": (lambda f: edit(f / "config.json", num_hidden_layers=0), "0 layers"),
    "negative width": (lambda f: edit(f / "config.json", hidden_size=-32), "config.json"),
    "width is text": (lambda f: edit(f / "config.json", hidden_size="many"), "config.json"),
    "other width": (shape, "config.json makes it"),
    "index upwards": (lambda f: point(f, "../evil.safetensors"), "points outside"),
    "index absolute": (lambda f: point(f, "/etc/passwd"), "points outside"),
    "index by backslash": (lambda f: point(f, "..\\evil.safetensors"), "points outside"),
    "index to a pickle": (lambda f: point(f, "evil.bin"), "no .safetensors file"),
    "index to a number": (lambda f: point(f, 7), "shard|weight_map"),
    "index is not JSON": (lambda f: index(f).write_text("nonsense"), "no weight_map"),
    "index without a map": (lambda f: index(f).write_text("{}"), "no weight_map"),
    "missing shard": (lambda f: min(f.glob("*.safetensors")).unlink(), "is missing"),
    "missing tensor": (drop, "no tensor of that name"),
    "pickle only": (pickled, "pickled weights only"),
    "pickle behind a decoy": (pickled_behind_a_decoy, "pickled weights only"),
    "header of an exabyte": (lambda f: header(f, 1 << 60), "not a readable safetensors"),
    "header cut short": (lambda f: header(f, 4096, b"{"), "not a readable safetensors"),
    "header is not JSON": (lambda f: header(f, 4, b"evil"), "not a readable safetensors"),
    "offsets beyond the file": (
        lambda f: header(f, 64, b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'.ljust(64)),
        "not a readable safetensors",
    ),
    "empty file": (lambda f: min(f.glob("*.safetensors")).write_bytes(b""), "not a readable safetensors"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_refused_in_one_line_before_a_tensor_is_read(folder, name):
    spoil, words = FAULTS[name]
    spoil(folder)
    folders._check.cache_clear()
    with pytest.raises(UserError, match=words) as caught:
        models.snapshot(str(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Evil.ran


@pytest.mark.loads
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value):
    model = toys.model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        models.load_model(str(tmp_path / "model"), ModelConfig(dtype="float32"), CPU)


@pytest.mark.loads
def test_a_sound_folder_loads_and_a_broken_tokenizer_is_one_line(folder):
    models.load_model(str(folder), ModelConfig(dtype="float32"), CPU)
    with pytest.raises(UserError, match="no tokenizer that can be read"):
        models.load_tokenizer(str(folder))
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Evil"}}')
    with pytest.raises(UserError, match="no tokenizer that can be read"):
        models.load_tokenizer(str(folder))


def called(tree: ast.AST) -> Iterator[str]:
    """Dotted names of what is called, of what is imported, and flags that are set to true."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)
            yield from (f"{word.arg}=True" for word in node.keywords if ast.unparse(word.value) == "True")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (f"import {alias.name.split('.')[0]}" for alias in node.names)
            yield f"import {getattr(node, 'module', None) or ''}"


@pytest.mark.loads
def test_no_pickle_no_exec_and_no_remote_code_of_ours():
    """In the source itself, whatever a test happens to run."""
    forbidden = {"exec", "eval", "compile", "torch.load", "torch.save", "os.system", "trust_remote_code=True"}
    forbidden |= {"shell=True", "import pickle", "import marshal", "import shelve", "import dill", "import joblib"}
    files = [path for part in ("engine", "kernels", "recipes") for path in (ROOT / part).rglob("*.py")]
    assert len(files) > 50
    for path in files:
        found = set(called(ast.parse(path.read_text(encoding="utf-8"))))
        if (
            path.parts[-2:] == ("baichuan", "conversion.py") and "weights_only=True" in found
        ):  # the one command that may: SECURITY.md
            found.discard("torch.load")
        assert not forbidden & found, path
