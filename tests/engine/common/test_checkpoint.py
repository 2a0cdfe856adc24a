"""Checkpoints are whole or not there; damage is found and named. Whole runs that resume: test_training.py."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from slicetune.engine.common import checkpoint
from slicetune.engine.common.errors import UserError

TENSORS = {"master/a": torch.arange(6.0).reshape(2, 3), "exp_avg/a": torch.ones(2, 3)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for step in (2, 10):
        checkpoint.save(tmp_path / f"step-{step}", TENSORS, {"step": step})
    return tmp_path


def test_round_trip(root):
    tensors, state = checkpoint.load(root / "step-10")
    assert state["step"] == 10
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_step_counts_of_groups(root):
    checkpoint.save(root / "step-10", TENSORS, {"step": 10, "group_steps": {"de-en": 7}})
    assert checkpoint.load(root / "step-10")[1]["group_steps"] == {"de-en": 7}
    checkpoint.save(root / "step-10", TENSORS, {"step": 10, "group_steps": {"de-en": -7}})
    with pytest.raises(UserError, match="not the state of a checkpoint"):
        checkpoint.load(root / "step-10")


def test_newest_counts_by_step_not_by_name(root):
    assert checkpoint.newest(root) == (root / "step-10", [])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
@pytest.mark.parametrize(
    "damage",
    [flip, lambda p: p.write_bytes(p.read_bytes()[:-1]), lambda p: p.write_bytes(bytes(p.stat().st_size)), Path.unlink],
    ids=["flipped", "truncated", "zeroed", "missing"],
)
def test_damage_is_found_and_passed_over(root, file, damage):
    damage(root / "step-10" / file)
    folder, faults = checkpoint.newest(root)
    assert folder == root / "step-2"
    assert file in faults[0]
    with pytest.raises(UserError, match=file):
        checkpoint.load(root / "step-10")


def test_an_unfinished_folder_is_named_and_ignored(root):
    (root / "step-10").rename(root / "step-12.partial")
    folder, faults = checkpoint.newest(root)
    assert folder == root / "step-2"
    assert "unfinished" in faults[0]


def test_a_full_disk_leaves_the_old_ones(root, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "sync", full)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save(root / "step-20", TENSORS, {"step": 20})
    assert sorted(p.name for p in root.iterdir()) == ["step-10", "step-2"]
    assert checkpoint.fault(root / "step-10") is None


def test_room_is_checked_first(root, monkeypatch):
    class Usage:
        free = 10

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(UserError, match="make room"):
        checkpoint.save(root / "step-20", TENSORS, {"step": 20})


def test_prune_keeps_the_newest_and_the_best(root):
    for step in (11, 12):
        checkpoint.save(root / f"step-{step}", TENSORS, {"step": step})
    checkpoint.prune(root, 2, root / "step-2")
    assert sorted(p.name for p in root.iterdir()) == ["step-11", "step-12", "step-2"]


def test_a_manifest_cannot_point_outside(root):
    manifest = root / "step-10" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("state.json", "../step-2/state.json"))
    assert "missing" in checkpoint.fault(root / "step-10")
