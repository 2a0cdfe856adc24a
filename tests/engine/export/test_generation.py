"""The exported model stops where it was taught to stop, and where its base did."""

from __future__ import annotations

import json

import pytest
import toys
from transformers import GenerationConfig

from slicetune.engine.export import delta
from slicetune.engine.export.model import export_model
from slicetune.engine.slices.patches import Patch

UP = "model.layers.0.mlp.up_proj.weight"


def written(tmp_path, config, generation, ends=(3,)):
    base = tmp_path / "base"
    toys.model_of_bytes("llama").save_pretrained(base)
    about = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(about | config))
    (base / "generation_config.json").unlink()
    if generation is not None:
        (base / "generation_config.json").write_text(json.dumps(generation))
    export_model(base, {}, tmp_path / "model", ends=ends)
    file = tmp_path / "model" / "generation_config.json"
    return json.loads(file.read_text()) if file.is_file() else None


REFUSED = {"do_sample": False, "temperature": 0.6, "eos_token_id": [2, 4], "pad_token_id": 0}
"""transformers loads it and refuses to save it."""


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 2}, {"eos_token_id": 2, "top_p": 0.9}, {"eos_token_id": [2, 3], "top_p": 0.9}),
        ({"eos_token_id": 2}, {"eos_token_id": 2, "_from_model_config": True}, {"eos_token_id": [2, 3]}),
        ({"eos_token_id": 2}, {"pad_token_id": 0, "eos_token_id": None}, {"pad_token_id": 0, "eos_token_id": [2, 3]}),
        ({"eos_token_id": 2, "pad_token_id": 0}, None, {"eos_token_id": [2, 3], "pad_token_id": 0}),
        ({"eos_token_id": None}, None, {"eos_token_id": [3]}),
        ({"eos_token_id": 2}, REFUSED, REFUSED | {"eos_token_id": [2, 4, 3]}),
        ({"eos_token_id": 2}, {"eos_token_id": [2, 3]}, {"eos_token_id": [2, 3]}),  # byte for byte the base's
    ],
)
def test_the_end_that_was_trained_stands_behind_the_bases(tmp_path, config, generation, expected):
    nothing = {"bos_token_id": None}  # else LlamaConfig's own is taken
    found = written(tmp_path, config | nothing, generation)
    assert found == expected
    assert GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id == expected["eos_token_id"]


def test_without_ends_the_file_is_the_bases(tmp_path):
    assert written(tmp_path, {"eos_token_id": 2}, REFUSED, ends=()) == REFUSED
    assert written(tmp_path / "none", {"eos_token_id": 2}, None, ends=(2,)) is None


def test_a_delta_puts_the_end_in_and_takes_it_out(tmp_path):
    written(tmp_path, {"eos_token_id": 2}, {"eos_token_id": 2})
    patches = {UP: Patch("row", toys.torch.tensor([1]), toys.torch.ones(1, 32))}
    base, model = tmp_path / "base", tmp_path / "trained"
    export_model(base, patches, model, ends=(2, 3))
    delta.write(base, model, patches, tmp_path / "delta")
    delta.apply(base, tmp_path / "delta", tmp_path / "applied")
    delta.subtract(tmp_path / "applied", tmp_path / "delta", tmp_path / "back")
    listed = [GenerationConfig.from_pretrained(tmp_path / name).eos_token_id for name in ("applied", "back")]
    assert listed == [[2, 3], [2]]
