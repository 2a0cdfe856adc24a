"""A slice delta: the trained rows and columns with the old ones beside them, to put into the base and take out again.

    slicetune delta apply BASE runs/caneft/delta MODEL
    slicetune delta subtract MODEL runs/caneft/delta BASE      # the base, bit for bit

`delta.safetensors` holds `<tensor>/<axis>/index|old|new`: indices int64 [k]; rows [k, in] or columns [k, out], the old
in the base's dtype and the new in the export's; `delta.json` says of which model and how large.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..common import sealed
from ..common.errors import UserError
from ..common.files import whole_folder
from ..common.shards import open_shard, tensor_files
from ..methods.landermt.routes import ROUTES
from ..models.names import stored_names
from ..slices.patches import Patch
from . import generation
from .model import export_model

FORMAT, FILE = "slicetune.delta", "delta.safetensors"
Path_ = str | os.PathLike[str]


def write(base: Path_, model: Path_, patches: Mapping[str, Patch], out: Path_) -> str:
    """Write the slices that `patches` name, as they are in `base` and in the exported `model`; returns a line on it."""
    base, model, out = Path(base), Path(model), Path(out)
    live = {key: name for name, key in stored_names(base, patches, tensor_files(base)).items()}
    tensors, about = {}, {"format": FORMAT, "tensors": {}}
    for kind, folder in (("old", base), ("new", model)):
        for key, tensor in _read(folder, list(live)):
            patch = patches[live[key]]
            tensors[f"{key}/{patch.axis}/{kind}"] = _slice(tensor, patch.axis, patch.index).contiguous()
            index = patch.index.to(torch.int64).clone()  # a weight and its bias share theirs, a file does not
            tensors[f"{key}/{patch.axis}/index"] = index
            about["tensors"][key] = {"module": live[key].rpartition(".")[0], "shape": list(tensor.shape)}
            about[f"{kind}_dtype"] = str(tensor.dtype).removeprefix("torch.")
    about["ends"] = [end for end in generation.ends(model) if end not in generation.ends(base)]
    about["weights"] = sum(value.numel() for name, value in tensors.items() if name.endswith("/new"))
    about["bytes"] = sum(value.numel() * value.element_size() for value in tensors.values())
    with whole_folder(out) as unfinished:
        sealed.write(unfinished / FILE, tensors, {"format": FORMAT, "about": json.dumps(about)})
        _copy_routes(model, unfinished)
        (unfinished / "delta.json").write_text(json.dumps(about, indent=1) + "\n")
    return f"delta: {about['weights']:,} weights in {len(live)} tensors, old and new, {about['bytes'] / 1e6:.1f} MB"


def read_about(delta: Path_) -> dict[str, Any]:
    """delta.json: weights, bytes, dtypes, and of every tensor the module it belongs to and its shape."""
    try:
        about = json.loads((Path(delta) / "delta.json").read_text())
        if about["format"] != FORMAT:
            raise ValueError(f"its format is {about['format']!r}")
        return about
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{delta}: not a slice delta ({error}): name the delta/ folder of a run") from None


def apply(base: Path_, delta: Path_, out: Path_) -> None:
    """`base` with the delta's new slices: the run's exported model. Raises UserError for another base."""
    _move(Path(base), Path(delta), Path(out), "old", "new")
    _copy_routes(Path(delta), Path(out))


def subtract(model: Path_, delta: Path_, out: Path_) -> None:
    """`model` with the old slices in the base's dtype: the base. Raises UserError for another model."""
    _move(Path(model), Path(delta), Path(out), "new", "old")


def slices(delta: Path_) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
    """(tensor name, axis, {"index", "old", "new"}) of every slice, one in memory at a time.

    The digest is checked first, and that delta.json says what the sealed header does.
    """
    path, remedy = Path(delta) / FILE, f"delete {delta} and give the run's command again"
    if path.is_file():
        sealed.check(path, FORMAT, remedy)
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("about") != json.dumps(read_about(delta)):
                raise UserError(f"{delta}/delta.json: is not what was written with {FILE}; {remedy}")
            for key in file.keys():  # noqa: SIM118
                name, axis, kind = key.rsplit("/", 2)
                if kind == "index":
                    yield name, axis, {k: file.get_tensor(f"{name}/{axis}/{k}") for k in ("index", "old", "new")}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{delta}: not a slice delta ({error}): name the delta/ folder of a run") from None


def _move(source: Path, delta: Path, out: Path, before: str, after: str) -> None:
    about = read_about(delta)
    patches = {name: (axis, part) for name, axis, part in slices(delta)}
    files = tensor_files(source)
    lost = sorted(patches.keys() - files.keys())
    if lost:
        raise UserError(f"{source} has no tensor {lost[0]}: the delta belongs to another model")
    for name, tensor in _read(source, list(patches)):
        axis, part = patches[name]
        if tensor.dtype != part[before].dtype or not _fits(tensor, axis, part["index"], part[before]):
            raise UserError(f"{source}: {name} does not hold the delta's {before} values: it belongs to another model")
    dtype = "auto" if about["old_dtype"] == about["new_dtype"] else about[f"{after}_dtype"]
    new = {n: Patch(axis, part["index"], part[after]) for n, (axis, part) in patches.items()}
    export_model(source, new, out, dtype)
    generation.change(out, **{"more" if after == "new" else "fewer": about.get("ends", ())})


def _copy_routes(source: Path, out: Path) -> None:
    """What a routed model has beside its slices."""
    if (source / ROUTES).is_file():
        shutil.copyfile(source / ROUTES, out / ROUTES)


def _fits(tensor: Tensor, axis: str, index: Tensor, values: Tensor) -> bool:
    if int(index.max()) >= tensor.shape[0 if axis == "row" else 1]:
        return False
    here = _slice(tensor, axis, index)
    return here.shape == values.shape and torch.equal(here, values)


def _slice(tensor: Tensor, axis: str | None, index: Tensor | None) -> Tensor:
    assert index is not None, "a delta is of rows and columns"
    return tensor[index] if axis == "row" else tensor[:, index].t()


def _read(folder: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Those tensors of a model, a shard opened once."""
    files = tensor_files(folder)
    for shard in sorted({files[name] for name in names}):
        with open_shard(folder / shard) as opened:
            for name in (n for n in names if files[n] == shard):
                yield name, opened.read(name)
