"""Safetensors shards of a model folder: which tensor lies where, reading one at a time, writing as a stream.

    files = tensor_files(folder)              # {"model.norm.weight": "model-00004-of-00004.safetensors", …}
    names = match_names(live_names, files)    # a live module's name → the file's key, which may lack a prefix

The library's own writer wants a whole shard in memory, and a shard may be the whole model: this one holds one tensor.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from .errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The file format's name of a dtype → torch's."""
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Of weights that are not quantised."""
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """One tensor of a shard, without its values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        return self.count * self.dtype.itemsize


class Shard:
    """An open shard: its entries in file order and its tensors, read one by one."""

    def __init__(self, path: Path, handle: Any) -> None:
        self.path, self.handle = path, handle
        self.metadata: dict[str, str] | None = handle.metadata()
        self.entries = {name: self._entry(name) for name in handle.offset_keys()}

    def _entry(self, name: str) -> Entry:
        part = self.handle.get_slice(name)
        if part.get_dtype() not in DTYPES:
            raise UserError(f"{self.path}: {name} is stored as {part.get_dtype()}: take the unquantised checkpoint")
        return Entry(name, DTYPES[part.get_dtype()], tuple(part.get_shape()))

    def read(self, name: str) -> Tensor:
        return self.handle.get_tensor(name)

    def part(self, name: str, axis: int, number: int, parts: int) -> Tensor:
        """One of so many equal parts along an axis (0 or 1); the rest is not read."""
        size = self.entries[name].shape[axis] // parts
        span = slice(number * size, (number + 1) * size)
        return self.handle.get_slice(name)[(span,) if axis == 0 else (slice(None), span)]


@contextmanager
def open_shard(path: Path) -> Iterator[Shard]:
    """Raises UserError where the file is truncated or no safetensors file."""
    try:
        handle = safe_open(path, framework="pt", device="cpu")
    except Exception as error:  # safetensors raises its own kinds and OSError; all mean that the file is unusable
        raise UserError(f"{path}: not a readable safetensors file ({error}): download it again") from None
    with handle as opened:
        yield Shard(path, opened)


def tensor_files(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Tensor name → name of the shard that holds it, shards in the order of their names.

    Raises UserError, before a tensor is read, for a folder without safetensors, a shard that is missing or lies
    elsewhere (`../`), and an index that names a tensor which its shard has not.
    """
    folder = Path(folder)
    if (folder / SINGLE).is_file():
        with open_shard(folder / SINGLE) as shard:
            return dict.fromkeys(shard.entries, SINGLE)
    if not (folder / INDEX).is_file():
        raise UserError(_nothing_to_read(folder))
    listed = _weight_map(folder / INDEX)
    found: dict[str, str] = {}
    for name in sorted(set(listed.values())):
        with open_shard(folder / name) as shard:
            found.update(dict.fromkeys(shard.entries, name))
    for tensor, name in listed.items():
        if found.get(tensor) != name:
            raise UserError(f"{folder / INDEX}: {tensor} is not in {name}: download the checkpoint again")
    return found


def _weight_map(index: Path) -> dict[str, str]:
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(listed.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: no weight_map of tensor to shard in it: download it again") from None
    for name in names:
        if not isinstance(name, str) or name != os.path.basename(name) or "\\" in name or name in ("", ".", ".."):
            raise UserError(f"{index}: shard {name!r} points outside the folder: do not use this checkpoint")
        if not name.endswith(".safetensors"):
            raise UserError(f"{index}: shard {name!r} is no .safetensors file: convert the checkpoint first")
        if not (index.parent / name).is_file():
            raise UserError(f"{index}: shard {name} is missing: download the checkpoint again")
    return listed


def _nothing_to_read(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is no folder on this machine: name a Hugging Face model folder, or download the model first"
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        return (
            f"{folder} holds pickled weights only, which are not read: convert them where you trust them, "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)"
        )
    return f"{folder} has neither {SINGLE} nor {INDEX}: name a Hugging Face model folder"


def match_names(names: Iterable[str], keys: Iterable[str]) -> dict[str, str]:
    """Live parameter name → key in the file, whose prefix may differ (`h.0.mlp…` for `transformer.h.0.mlp…`).

    The longest common suffix wins. It must reach back to the module list (`layers.3.…`), or, in names without a
    number, to the start of one of the two; numbers must agree. Raises UserError where a name has no or two keys.
    """
    keys = list(keys)
    known = set(keys)
    matched = {name: name if name in known else _closest(name, keys) for name in names}
    owner: dict[str, str] = {}
    for name, key in matched.items():
        if key in owner:
            raise UserError(f"{owner[key]} and {name} both fit {key} of the checkpoint: is this the right base model?")
        owner[key] = name
    return matched


def _closest(name: str, keys: list[str]) -> str:
    parts = name.split(".")
    found: dict[int, list[str]] = {}
    for key in keys:
        other = key.split(".")
        if _numbers(parts) == _numbers(other) and (shared := _common_suffix(parts, other)) >= _needed(parts, other):
            found.setdefault(shared, []).append(key)
    if not found:
        raise UserError(f"{name}: no tensor of that name in the checkpoint: is this the right base model?")
    best = found[max(found)]
    if len(best) > 1:
        raise UserError(f"{name} fits {best[0]} and {best[1]} of the checkpoint alike: is this the right base model?")
    return best[0]


def _numbers(parts: list[str]) -> list[str]:
    return [part for part in parts if part.isdigit()]


def _needed(parts: list[str], other: list[str]) -> int:
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return min(len(parts), len(other)) if first is None else len(parts) - max(first - 1, 0)


def _common_suffix(a: list[str], b: list[str]) -> int:
    shared = 0
    while shared < min(len(a), len(b)) and a[-1 - shared] == b[-1 - shared]:
        shared += 1
    return shared


def write_shard(
    path: Path, entries: Iterable[Entry], read: Callable[[str], Tensor], metadata: dict[str, str] | None
) -> None:
    """Write a safetensors file one tensor at a time and flush it to the disk.

    Wide dtypes come first, as the library has it: readers map tensors in place and need them aligned. Entries that
    the library wrote are in that order already, so a shard of which nothing changes comes out byte for byte the same.
    """
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for entry in ordered:
        span = [offset, offset + entry.bytes]
        header[entry.name] = {"dtype": CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
        offset += entry.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in ordered:
            tensor = read(entry.name)
            assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), entry
            file.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
        file.flush()
        os.fsync(file.fileno())
