"""Sealed safetensors files: a sha256 in the header is of the whole file, and is checked before a tensor is read.

write(path, tensors, {"format": "slicetune.routes"})
check(path, "slicetune.routes", "select again")     # UserError in one line unless every byte is as written
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UserError
from .files import whole_file
from .shards import CODES

UNKNOWN = "0" * 64
"""Stands in the header for the file's digest while that is computed: the digest is of the file with this in it."""
DIGEST = re.compile(rb'"digest": "([^"]*)"')
_CODES = CODES | {torch.uint16: "U16"}


@dataclass(frozen=True)
class Coming:
    """A tensor that nobody holds whole: its pieces, as `pieces` cuts one, come in order while it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Iterator[Tensor]

    def numel(self) -> int:
        return math.prod(self.shape)


def write(
    path: Path,
    tensors: Mapping[str, Tensor | Coming],
    metadata: dict[str, str],
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Write tensors, piece by piece, under a temporary name that is then renamed.

    `dtypes`: what a tensor is on disk where it is not its own; wide types come first, else in the order given.
    safetensors' writer wants all bytes in memory at once.
    """
    on_disk = {name: tensor.dtype for name, tensor in tensors.items()} | dict(dtypes or {})
    names = sorted(tensors, key=lambda name: -on_disk[name].itemsize)  # readers map tensors and need them aligned
    header: dict[str, Any] = {"__metadata__": {"digest": UNKNOWN} | metadata}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].numel() * on_disk[name].itemsize
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _CODES[on_disk[name]], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as unfinished, unfinished.open("wb") as file:
        digest = hashlib.sha256(head := len(text).to_bytes(8, "little") + text)
        file.write(head)
        for data in (_bytes(piece, on_disk[name]) for name in names for piece in pieces(tensors[name])):
            digest.update(data)
            file.write(data)
        file.seek(head.index(UNKNOWN.encode()))
        file.write(digest.hexdigest().encode())


def check(path: Path, kind: str, remedy: str) -> None:
    """Raise UserError unless the digest in the header is the file's: one pass over it, 4 s for 2 GB.

    A file that is not of that `kind` (its metadata's format) and has no digest passes: its reader says what it is.
    """
    with path.open("rb") as file:
        length = file.read(8)
        header = file.read(min(int.from_bytes(length, "little"), 100_000_000))
        found = DIGEST.search(header)
        if not found:
            if kind.encode() in header:
                raise UserError(f"{path}: carries no digest: an older slicetune or another program wrote it; {remedy}")
            return
        digest = hashlib.sha256(length + header[: found.start(1)] + UNKNOWN.encode() + header[found.end(1) :])
        while piece := file.read(1 << 22):
            digest.update(piece)
    if digest.hexdigest().encode() != found[1]:
        raise UserError(f"{path}: its content is not what was written (sha256); {remedy}")


def add(file: Any, sums: Mapping[str, Tensor]) -> None:
    """Add an open file's tensors to those of the same names, in place. Raises ValueError for another shape or type."""
    for name, tensor in sums.items():
        stored = file.get_tensor(name)
        if (stored.shape, stored.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(f"{name} is {stored.dtype} {list(stored.shape)}, not {list(tensor.shape)}")
        tensor += stored


def pieces(tensor: Tensor | Coming) -> Iterator[Tensor]:
    """Views of a [groups, layers, ...] tensor, one a group and layer; the tensor itself where it has fewer axes."""
    if isinstance(tensor, Coming):
        yield from tensor.pieces
    elif tensor.dim() < 3:
        yield tensor
    else:
        yield from (piece for group in tensor for piece in group)


def _bytes(tensor: Tensor, dtype: torch.dtype) -> memoryview:
    return memoryview(tensor.to("cpu", dtype).contiguous().reshape(-1).view(torch.uint8).numpy())
