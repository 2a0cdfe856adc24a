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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import UserError
from .files import sync
from .shards import Entry, write_shard

MANIFEST = "manifest.json"
MASTER = "master/"
"""What stands before a trained parameter's name where a file has its fp32 value."""


def masters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The fp32 values of a checkpoint's tensors, by the parameters' names."""
    return {name.removeprefix(MASTER): value for name, value in tensors.items() if name.startswith(MASTER)}


def save(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write a checkpoint to `folder`. Raises UserError if the disk has no room; what was there before stays."""
    need = sum(t.numel() * t.element_size() for t in tensors.values())
    entries = [Entry(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    fill = lambda partial: write_shard(partial / "state.safetensors", entries, tensors.__getitem__, None)  # noqa: E731
    write(folder, state, need, fill)


def write(folder: Path, state: dict[str, Any], need: int, fill: Callable[[Path], None]) -> None:
    """Make `folder` out of state.json and what `fill(folder)` writes (about `need` bytes), whole or not at all.

    An older folder of that name is moved aside before the new one takes its place, so that at every moment one of
    them is whole. Raises UserError if the disk has no room.
    """
    partial, stale = folder.with_name(f"{folder.name}.partial"), folder.with_name(f"{folder.name}.stale")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _room(folder, need + 1_000_000)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        fill(partial)
        _write(partial / "state.json", json.dumps(state, indent=1))
        files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(partial.iterdir())}
        _write(partial / MANIFEST, json.dumps(files, indent=1))
        sync(partial)
        if folder.exists():
            shutil.rmtree(stale, ignore_errors=True)
            folder.rename(stale)
        partial.rename(folder)
        sync(folder.parent)
        shutil.rmtree(stale, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{folder}: could not be written ({error.strerror}); earlier checkpoints are untouched: make room, resume"
        ) from error


def _room(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < need:
        raise UserError(f"{folder}: a checkpoint needs {need >> 20} MiB, the disk has {free >> 20}: make room, resume")


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint (file and reason), or None if it is whole."""
    if folder.name.endswith(".partial"):
        return f"{folder}: unfinished (the process ended while writing it)"
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        listed = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{folder / MANIFEST}: missing or unreadable"
    for name, (size, digest) in listed.items():
        path = folder / name
        if Path(name).name != name or path.is_symlink() or not path.is_file():
            return f"{path}: missing"
        if path.stat().st_size != size:
            return f"{path}: {path.stat().st_size} bytes, {size} were written"
        if _sha256(path) != digest:
            return f"{path}: its content changed since it was written (sha256)"
    return None if "state.json" in listed else f"{folder / MANIFEST}: does not list state.json"


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a checkpoint. Raises UserError naming the file if it is not whole."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    problem = fault(folder)
    if problem:
        raise UserError(f"{problem}: name another checkpoint, or --resume auto for the newest whole one")
    try:
        return load_file(folder / "state.safetensors"), read_state(folder)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder}/state.safetensors: {error}: name another checkpoint, or --resume auto") from None


def read_state(folder: Path) -> dict[str, Any]:
    """state.json. Raises UserError if it is not the state of a checkpoint."""
    path = folder / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        counts = [state["step"], *(state.get(name, 0) for name in ("best_step", "dev_step")), *state.get("skipped", [])]
        counts += state.get("group_steps", {}).values()
        sound = all(isinstance(count, int) and count >= 0 for count in counts)
        sound = sound and isinstance(state.get("best_dev_loss", 0.0), int | float)
        sound = sound and isinstance(state.get("identity", {}), dict)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise UserError(f"{path}: not the state of a checkpoint: name another one, or --resume auto")
    return state


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint under `root`, and what was wrong with each that was passed over."""
    faults = []
    for folder in sorted(root.glob("step-*"), key=_step, reverse=True):
        problem = fault(folder)
        if problem is None:
            return folder, faults
        faults.append(problem)
    return None, faults


def prune(root: Path, keep: int, *also: Path) -> None:
    """Delete all but the newest `keep` checkpoints and `also` (the best one …), unfinished and stale folders too."""
    found = sorted(root.glob("step-*"), key=_step)
    whole = [f for f in found if not f.suffix]
    for folder in [*whole[: -keep or None], *(f for f in found if f.suffix in (".partial", ".stale"))]:
        if folder not in also:
            shutil.rmtree(folder, ignore_errors=True)


def _step(folder: Path) -> tuple[int, bool]:
    """Order of checkpoints: by step, of two of the same step the one that is not stale last."""
    digits = folder.name.removeprefix("step-").split(".")[0]
    return int(digits) if digits.isascii() and digits.isdigit() else -1, folder.suffix != ".stale"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, text: str) -> None:
    with path.open("wb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
