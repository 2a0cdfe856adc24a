"""Checkpoints that survive: written whole or not at all, verified when read, pickle-free.

A checkpoint is a folder `step-N`: state.safetensors (fp32 master, exp_avg, exp_avg_sq of the trained slices by
name), state.json (step, epoch, order, metrics) and manifest.json (size and sha256 of both), written last into a
temporary folder that is then renamed. It never holds the frozen base and does not depend on the ZeRO stage or the
number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import UserError

MANIFEST = "manifest.json"


def save(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write a checkpoint to `folder`. Raises UserError if the disk has no room; what was there before stays."""
    from safetensors.torch import save_file

    need = sum(t.numel() * t.element_size() for t in tensors.values()) + 1_000_000
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < need:
        raise UserError(f"{folder}: a checkpoint needs {need >> 20} MiB, the disk has {free >> 20}: make room, resume")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, partial / "state.safetensors")
        _write(partial / "state.json", json.dumps(state, indent=1))
        files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(partial.iterdir())}
        _sync(partial / "state.safetensors")
        _write(partial / MANIFEST, json.dumps(files, indent=1))
        _sync(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        _sync(folder.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{folder}: could not be written ({error.strerror}); earlier checkpoints are untouched"
        ) from error


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint (file and reason), or None if it is whole."""
    if folder.name.endswith(".partial"):
        return f"{folder}: unfinished (the process ended while writing it)"
    try:
        files = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"{folder / MANIFEST}: missing or unreadable"
    for name, entry in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            return f"{path}: missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{path}: {path.stat().st_size} bytes, {entry['bytes']} were written"
        if _sha256(path) != entry["sha256"]:
            return f"{path}: its content changed since it was written (sha256)"
    return None


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a checkpoint. Raises UserError naming the file if it is not whole."""
    from safetensors.torch import load_file

    problem = fault(folder)
    if problem:
        raise UserError(f"{problem}: name another checkpoint, or --resume auto for the newest whole one")
    return load_file(folder / "state.safetensors"), read_state(folder)


def read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text())


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint under `root`, and what was wrong with each that was passed over."""
    faults = []
    for folder in sorted(root.glob("step-*"), key=_step, reverse=True):
        problem = fault(folder)
        if problem is None:
            return folder, faults
        faults.append(problem)
    return None, faults


def prune(root: Path, keep: int, also: Path | None) -> None:
    """Delete all but the newest `keep` checkpoints and `also` (the best one), unfinished folders too."""
    whole = sorted((f for f in root.glob("step-*") if not f.name.endswith(".partial")), key=_step)
    for folder in [*whole[: -keep or None], *root.glob("step-*.partial")]:
        if folder != also:
            shutil.rmtree(folder, ignore_errors=True)


def _step(folder: Path) -> int:
    digits = folder.name.removeprefix("step-").split(".")[0]
    return int(digits) if digits.isdigit() else -1


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    _sync(path)


def _sync(path: Path) -> None:
    """Ask the disk to keep what was written (a folder's entries too) before the next step relies on it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
