"""Trials of a disk that is killed or fails at one operation: what must hold after each. The tests make a sample of
them, `make faults` (campaign.py) all.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from fault_jobs import tensors
from fault_pool import KILLED, Killer

from slicetune.engine.common import checkpoint

MOMENTS = ("before", "half", "after")
Point = tuple[int, str, str]
"""Number of the disk operation from 1, when, which."""


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, through dictionaries; of dictionaries the keys that both have."""
    if isinstance(a, dict):
        return bool(a.keys() & b.keys()) and all(same(a[key], b[key]) for key in a.keys() & b.keys())
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else True


def prepare(root: Path) -> None:
    """Two whole checkpoints and one that a kill left unfinished; the next save replaces the newer one."""
    shutil.rmtree(root / "checkpoints", ignore_errors=True)
    root = root / "checkpoints"
    for step in (2, 4):
        checkpoint.save(root / f"step-{step}", tensors(step), {"step": step})
    shutil.copytree(root / "step-2", root / "step-3.partial")


def points(killer: Killer, root: Path) -> list[Point]:
    """Every operation of a save and its pruning, where the same step was saved before, at every moment."""
    prepare(root)
    trial = killer.run("save_one", str(root / "checkpoints"), 4, 1)
    assert trial.code == 0, trial.error
    moments = {"write": MOMENTS}
    named = enumerate(trial.operations, 1)
    return [(number, when, name) for number, name in named for when in moments.get(name, ("before", "after"))]


def kill_a_save(killer: Killer, root: Path, number: int, when: str) -> str | None:
    """What went wrong, or None: killed there, the newest whole checkpoint is the old or the new step 4."""
    prepare(root)
    folder = root / "checkpoints"
    trial = killer.run("save_one", str(folder), 4, 1, kill=(number, when))
    if trial.code != KILLED:
        return f"it ended with {trial.code}: {trial.error}"
    newest, _ = checkpoint.newest(folder)
    if newest is None or not newest.name.startswith("step-4"):
        return f"the newest whole checkpoint is {newest}"
    loaded, state = checkpoint.load(newest)
    if state["step"] != 4 or not same(loaded, tensors(4)):
        return f"{newest} holds something else"
    again = killer.run("save_one", str(folder), 6, 1)
    left = sorted(p.name for p in folder.iterdir())
    return None if again.code == 0 and left == ["step-6"] else f"the next save left {left}: {again.error}"


def fail_a_save(killer: Killer, root: Path, number: int, code: int) -> str | None:
    """What went wrong, or None: the disk fails from there on, the error is one line, and step 4 is whole."""
    prepare(root)
    folder = root / "checkpoints"
    trial = killer.run("save_one", str(folder), 4, 1, fail=(number, code))
    if trial.code and "UserError" not in trial.error:
        return trial.error
    newest, _ = checkpoint.newest(folder)
    return None if newest and newest.name.startswith("step-4") else f"the newest whole checkpoint is {newest}"


def kill_training(killer: Killer, out: Path, point: tuple[int, str], unbroken: Any) -> str | None:
    """What went wrong, or None: training killed there and started again ends with the unbroken run's bits."""
    shutil.rmtree(out, ignore_errors=True)
    killed = killer.run("train_toys", str(out), {}, kill=point)
    if killed.code != KILLED:
        return f"it ended with {killed.code}: {killed.error}"
    again = killer.run("train_toys", str(out), {})
    if again.code:
        return again.error
    return None if same(again.value, unbroken) and again.value.keys() == unbroken.keys() else "other weights"
