"""Write the trained model: the base checkpoint's shards, tensor by tensor, with the trained slices in their place.

    export_model("models/llama", {"model.layers.0.mlp.up_proj.weight": Patch("row", index, values)}, "runs/x/model")

The live model is not asked: a tensor that no patch names is copied byte for byte, so that what was not trained cannot
have changed (audit.py proves it afterwards). Memory holds one tensor and its patched copy at a time.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..common.errors import UserError
from ..common.files import whole_folder
from ..common.shards import FLOATS, INDEX, SINGLE, Entry, open_shard, tensor_files, write_shard
from ..methods.expansion import Expansion
from ..models.names import aliases, stored_names
from ..models.sites import empty_model
from ..slices.patches import Patch
from . import generation

COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.model",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Files beside the weights that a model needs to load, decode and be passed on."""


def export_model(
    base_dir: str | os.PathLike[str],
    patches: Mapping[str, Patch],
    out_dir: str | os.PathLike[str],
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    expansion: Expansion | None = None,
    ends: Sequence[int] = (),
) -> dict[str, Any]:
    """Write `base_dir` with `patches` (live tensor name → new values) to `out_dir`; one process calls it.

    `auto` keeps each tensor's dtype; `expansion` makes the model a deeper one, and patches name its tensors. `ends` are
    tokens that the model was taught to end with: its generation config lists them, so that plain `generate` stops.
    `out_dir` appears complete or not at all; an export that lies there is replaced.
    Returns `patched` (weights that patches cover), `updated` (whose fp32 value differs from the base's), `changed`
    (whose stored value differs, after rounding to the stored dtype), `lost` (the share of updates that the rounding
    swallowed), `dtype` and `bytes`. Raises UserError for a patch that fits no tensor, values that are not finite, a
    base that cannot be read, an `out_dir` that is somebody else's, and a disk without room.
    """
    base, out = Path(base_dir), Path(out_dir)
    names = expansion.names if expansion else lambda name: [name]
    files = {new: shard for name, shard in tensor_files(base).items() for new in names(name)}
    keyed = by_key(base, patches, files)
    wanted = None if dtype == "auto" else getattr(torch, dtype)
    plan = {shard: _plan(base / shard, wanted, names) for shard in dict.fromkeys(files.values())}
    size = sum(entry.bytes for entries in plan.values() for entry in entries)
    _check_target(base, out, size)
    tally: Counter[str] = Counter()
    with whole_folder(out) as temp:
        for shard, entries in plan.items():
            tally += _export_shard(base / shard, temp / shard, entries, keyed)
        if SINGLE not in plan:
            _write_json(temp / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))})
        _copy_files(base, temp, dtype, expansion)
        generation.change(temp, more=ends)
    stored = _main_dtype(plan)
    lost = 1 - tally["changed"] / tally["updated"] if tally["updated"] else 0.0
    counts = {name: tally[name] for name in ("patched", "updated", "changed")}
    return {**counts, "lost": max(lost, 0.0), "dtype": stored, "bytes": size}


def by_key(base: Path, patches: Mapping[str, Patch], files: Mapping[str, str]) -> dict[str, Patch]:
    """The patches by the keys that they change; a tied tensor's go to each key under which the files have it."""
    if not patches:
        return {}
    found = {key: patches[name] for name, key in stored_names(base, patches, files).items()}
    for name, others in aliases(empty_model(base)).items():
        for other in (o for o in others if name in patches and o not in patches and o in files):
            found[other] = patches[name]
    return found


def summary(result: Mapping[str, Any]) -> str:
    """What the run prints: how many weights changed, and the remedy where rounding swallowed most updates."""
    text = f"{result['changed']:,} of {result['patched']:,} trained weights changed in the {result['dtype']} export"
    if result["lost"] > 0.5:
        text += (
            f"; WARNING: rounding to {result['dtype']} swallowed {result['lost']:.0%} of the updates: "
            "export with --evaluate.dtype float32, or train with a higher --train.learning-rate"
        )
    return text


def apply_patch(name: str, tensor: Tensor, patch: Patch, dtype: torch.dtype) -> tuple[Tensor, Counter[str]]:
    """The tensor in `dtype` with the patch's values in it, and how many weights it covers, updates and changes."""
    if tensor.dtype not in FLOATS:
        raise UserError(f"{name} is stored as {tensor.dtype}, which cannot be patched: take the unquantised checkpoint")
    stored = tensor.to(dtype, copy=True)
    values = (patch.values(tensor) if callable(patch.values) else patch.values).detach().cpu()
    where: Any = ...
    if patch.axis is not None:
        assert patch.axis in ("row", "column"), patch.axis
        assert patch.index is not None
        index = patch.index.cpu()
        where = index if patch.axis == "row" else (slice(None), index)
        values = values.t() if patch.axis == "column" else values
        _check_index(name, index, tensor.shape[0 if patch.axis == "row" else 1])
    old = tensor[where]
    if old.shape != values.shape:
        raise UserError(
            f"{name}: {tuple(values.shape)} values do not fit {tuple(old.shape)} weights: not trained from this base"
        )
    new = values.to(dtype)
    if not bool(torch.isfinite(new).all()):
        raise UserError(f"{name}: trained values are not finite in {dtype}: export an earlier checkpoint")
    wide = torch.promote_types(old.dtype, values.dtype)
    counts = Counter(
        patched=values.numel(),
        updated=int((values.to(wide) != old.to(wide)).sum()),
        changed=int((new != old.to(dtype)).sum()),
    )
    stored[where] = new
    return stored, counts


def _check_index(name: str, index: Tensor, size: int) -> None:
    if len(index) and (int(index.min()) < 0 or int(index.max()) >= size):
        raise UserError(f"{name}: slice {int(index.max())} of {size}: the slices were not trained from this base model")
    assert len(index.unique()) == len(index), f"{name}: a slice is named twice"


def _plan(path: Path, wanted: torch.dtype | None, names: Callable[[str], list[str]]) -> dict[Entry, str]:
    """The shard's entries with the names and dtypes they will be stored in, and the base's name of each."""
    with open_shard(path) as shard:
        return {
            entry._replace(
                name=name, dtype=wanted if wanted is not None and entry.dtype in FLOATS else entry.dtype
            ): old
            for old, entry in shard.entries.items()
            for name in names(old)
        }


def _export_shard(source: Path, target: Path, plan: Mapping[Entry, str], patches: Mapping[str, Patch]) -> Counter[str]:
    tally: Counter[str] = Counter()
    entries = {entry.name: (old, entry.dtype) for entry, old in plan.items()}

    def read(name: str) -> Tensor:
        old, dtype = entries[name]
        tensor = shard.read(old)
        if name not in patches:
            return tensor.to(dtype)
        stored, counts = apply_patch(name, tensor, patches[name], dtype)
        tally.update(counts)
        return stored

    with open_shard(source) as shard:
        write_shard(target, list(plan), read, shard.metadata)
    return tally


def _main_dtype(plan: Mapping[str, Iterable[Entry]]) -> str:
    sizes: Counter[str] = Counter()
    for entries in plan.values():
        for entry in entries:
            sizes[str(entry.dtype).removeprefix("torch.")] += entry.count
    return sizes.most_common(1)[0][0]


def _check_target(base: Path, out: Path, size: int) -> None:
    here, there = base.resolve(), out.resolve()
    if here == there or there in here.parents:
        raise UserError(f"{out}: the export would replace its own base model: name another folder")
    if out.exists() and not (out.is_dir() and ((out / "config.json").is_file() or not any(out.iterdir()))):
        raise UserError(f"{out} exists and is no exported model, so it is not replaced: move it or name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < size * 1.01:
        raise UserError(f"{out}: the model needs {size / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB: make room")


def _copy_files(base: Path, temp: Path, dtype: str, expansion: Expansion | None) -> None:
    for pattern in COPIED:
        for path in sorted(base.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, temp / path.name)  # through a hub cache's links, without their permissions
    if (base / "additional_chat_templates").is_dir():
        shutil.copytree(base / "additional_chat_templates", temp / "additional_chat_templates")
    if (dtype != "auto" or expansion) and (temp / "config.json").is_file():
        config = json.loads((temp / "config.json").read_text(encoding="utf-8"))
        config = config if dtype == "auto" else _with_dtype(config, dtype)
        _write_json(temp / "config.json", expansion.config(config) if expansion else config)


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config with every field that names its weights' dtype set (`torch_dtype` is what older files call it)."""
    named = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    config = {**config, **dict.fromkeys(named, dtype)}
    for key, value in config.items():
        if isinstance(value, dict) and ("dtype" in value or "torch_dtype" in value):
            config[key] = _with_dtype(value, dtype)
    return config


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
