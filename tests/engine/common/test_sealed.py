"""Every kind of sealed file: a flipped bit anywhere is found, one of before the digest is named as that."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import toys
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from slicetune.engine.common import sealed
from slicetune.engine.common.errors import UserError
from slicetune.engine.export import delta
from slicetune.engine.methods.landermt.detection import Detection
from slicetune.engine.methods.landermt.routes import GENERAL, Routes
from slicetune.engine.models.shapes import from_config
from slicetune.engine.scoring.statistics import Statistics
from slicetune.engine.slices.patches import Patch

File = tuple[Path, Callable[[], object]]


def statistics(folder: Path) -> File:
    found, path = Statistics(["a", "b"], from_config(toys.model().config)), folder / "statistics.safetensors"
    found.samples += 3
    found.save(path, {"model": "abc"})
    return path, lambda: Statistics.load(path)


def awareness(folder: Path) -> File:
    found, path = Detection(("de-en",), 2, 6, 4), folder / "awareness.safetensors"
    found.awareness_sum += torch.rand(2, 2, 6)
    found.save(path, {"run": 1})
    return path, lambda: Detection.load(path)


def routes(folder: Path) -> File:
    table, path = torch.ones(1, 2), folder / "routes.safetensors"
    owner = torch.tensor([[GENERAL, 0, 1], [1, GENERAL, 0]], dtype=torch.int16)
    Routes(("de-en",), ("de", "en"), (0, 1), table.bool(), owner, table / 2, "learned", "input", 2, 3).save(path)
    return path, lambda: Routes.load(path)


def slice_delta(folder: Path) -> File:
    for name, seed in (("base", 0), ("model", 1)):
        toys.model(seed, torch.bfloat16).save_pretrained(folder / name)
    patches = {"model.layers.0.mlp.up_proj.weight": Patch("row", torch.tensor([1, 5]), torch.zeros(2, toys.HIDDEN))}
    delta.write(folder / "base", folder / "model", patches, folder / "delta")
    return folder / "delta" / "delta.safetensors", lambda: list(delta.slices(folder / "delta"))


@pytest.fixture(params=[statistics, awareness, routes, slice_delta], ids=lambda make: make.__name__)
def written(request, tmp_path) -> File:
    return request.param(tmp_path)


def test_a_flipped_bit_anywhere_is_found(written):
    """In the tensors, in the header, in the digest itself; the name of the digest's place is a part of the header."""
    path, read = written
    whole, draw = path.read_bytes(), random.Random(0)
    for place in (0, 8, whole.index(b'"digest"') + 15, *draw.sample(range(len(whole)), 40), len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"not what was written \(sha256\); delete|carries no digest") as error:
            read()
        assert str(path) in str(error.value)
    path.write_bytes(whole)
    read()


def test_a_file_of_before_the_digest_is_named_as_that(written):
    path, read = written
    with safe_open(path, framework="pt") as file:
        metadata = {name: value for name, value in file.metadata().items() if name != "digest"}
    save_file(load_file(path), path, metadata)
    with pytest.raises(UserError, match="carries no digest: an older slicetune or another program wrote it") as error:
        read()
    said = str(error.value)
    assert str(path) in said
    assert "again" in said.partition("; delete")[2]
    assert "\n" not in said


def test_a_file_of_another_kind_is_not_called_old(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"format": "slicetune.neurons"})
    sealed.check(path, "slicetune.routes", "")
    with pytest.raises(UserError, match=r"not 'slicetune\.routes'"):
        Routes.load(path)


def test_equal_content_is_equal_bytes_and_wide_tensors_lie_first(tmp_path):
    tensors = {"flag": torch.tensor([True, False, True]), "sum": torch.rand(2, 3, 4, dtype=torch.float64)}
    tensors |= {"none": torch.empty(0, 4), "count": torch.tensor([70_000 - 2**16, 65_535], dtype=torch.int32)}
    for name in ("one", "two"):
        sealed.write(tmp_path / name, tensors, {"format": "x", "of": "y"}, {"count": torch.uint16})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    back = load_file(tmp_path / "one")
    assert list(back["count"].to(torch.int32)) == [4464, 65_535]
    for name in ("flag", "sum", "none"):
        assert torch.equal(back[name], tensors[name])
    with safe_open(tmp_path / "one", framework="pt") as file:
        assert list(file.offset_keys()) == ["sum", "none", "count", "flag"]
