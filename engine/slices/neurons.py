"""NeuronSet: which neurons, why, and from what. The artefact that every method writes and every trainer reads.

A slice is a row of a projection's weight (its output channel) or a column (an FFN unit's part of `down`). Neurons are
numbered in one flat order everywhere: by layer, then projection in the shape's order, then index.

    neurons = NeuronSet.load("runs/caneft/neurons.safetensors")
    print(neurons.describe())
    control = NeuronSet.random(shape, like=neurons, seed=1)       # RCN: as many in each projection
    NeuronSet.from_json("mine.json", shape)                       # [[layer, "gate", index], ...]
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..common import __version__
from ..common.errors import UserError
from ..common.files import whole_file

FORMAT = "slicetune.neurons"
Axis = Literal["row", "column"]
Key = tuple[int, str, Axis]


class Shape(Protocol):
    """What of a model's shape a set of neurons needs; ModelShape, Statistics and NeuronSet have it."""

    @property
    def layers(self) -> int: ...
    @property
    def widths(self) -> Mapping[str, int]: ...
    @property
    def fan_in(self) -> Mapping[str, int]: ...


@dataclass(eq=False)
class NeuronSet:
    """Chosen slices of a model. Empty entries are dropped; a layer with none stays frozen.

    slices: (layer, projection, axis) → int64 indices, sorted and unique: of rows (below widths[projection]) or of
    columns (below fan_in[projection]). Equality and fingerprint are of the slices and the shape, not of provenance.
    """

    slices: dict[Key, Tensor]
    layers: int
    widths: dict[str, int]
    fan_in: dict[str, int]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.widths, self.fan_in = dict(self.widths), dict(self.fan_in)
        sizes = (self.layers, *self.widths.values(), *self.fan_in.values())
        if self.widths.keys() != self.fan_in.keys() or not all(type(n) is int and n > 0 for n in sizes):
            raise UserError(f"{self.layers} layers, widths {self.widths}, fan-in {self.fan_in}: not a model's shape")
        for (layer, projection, axis), index in self.slices.items():
            _check_slice(self, layer, projection, axis, index)
        filled = [key for key, index in self.slices.items() if len(index)]
        self.slices = {key: self.slices[key] for key in sorted(filled, key=lambda k: (k[0], *self._place(*k[1:])))}

    def _place(self, projection: str, axis: str) -> tuple[int, bool]:
        """Sorts projections in the shape's order, rows before columns."""
        return list(self.widths).index(projection), axis != "row"

    @classmethod
    def from_flat(cls, flat: Tensor, shape: Shape, provenance: dict[str, Any] | None = None) -> NeuronSet:
        """Rows by their flat number: int64 [count], in any order, each once."""
        block = sum(shape.widths.values())
        flat = flat.sort().values
        slices: dict[Key, Tensor] = {}
        for layer in range(shape.layers):
            start = layer * block
            for projection, width in shape.widths.items():
                first, last = torch.searchsorted(flat, torch.tensor([start, start + width])).tolist()
                slices[layer, projection, "row"] = flat[first:last] - start
                start += width
        return cls(slices, shape.layers, dict(shape.widths), dict(shape.fan_in), dict(provenance or {}))

    @classmethod
    def from_json(cls, path: str | os.PathLike[str], shape: Shape) -> NeuronSet:
        """A set of the user's own: a JSON list of [layer, projection, index]. Raises UserError naming the file."""
        entries = _read_json_list(path)
        found: dict[Key, list[int]] = defaultdict(list)
        for number, entry in enumerate(entries):
            kinds = [type(value) for value in entry] if isinstance(entry, list) else []
            if kinds != [int, str, int] or abs(entry[2]) >= 2**63:
                raise UserError(
                    f'{path}: entry {number} is {json.dumps(entry)[:80]}: write [layer, "projection", index]'
                )
            found[entry[0], entry[1], "row"].append(entry[2])
        try:
            slices = {key: torch.tensor(sorted(index), dtype=torch.int64) for key, index in found.items()}
            provenance = {"method": "given", "file": str(path)}
            return cls(slices, shape.layers, dict(shape.widths), dict(shape.fan_in), provenance)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    @classmethod
    def random(cls, shape: Shape, like: NeuronSet, seed: int) -> NeuronSet:
        """RCN: as many slices of each projection as `like` has, drawn uniformly over all layers; seeded, CPU-made.

        Trainable parameters are equal, since every slice of a projection has the same number of weights.
        """
        assert (shape.layers, dict(shape.widths), dict(shape.fan_in)) == (like.layers, like.widths, like.fan_in)
        generator = torch.Generator().manual_seed(seed)
        slices: dict[Key, Tensor] = {}
        for (projection, axis), count in like.counts().items():
            width = (like.widths if axis == "row" else like.fan_in)[projection]
            drawn = torch.randperm(like.layers * width, generator=generator)[:count]
            for layer in range(like.layers):
                slices[layer, projection, axis] = (drawn[drawn // width == layer] % width).sort().values
        provenance = {"method": "random", "seed": seed, "like": like.fingerprint}
        return cls(slices, like.layers, like.widths, like.fan_in, provenance)

    def union(self, other: NeuronSet) -> NeuronSet:
        """Every slice of either set. Raises UserError when they are of differently shaped models."""
        if (self.layers, self.widths, self.fan_in) != (other.layers, other.widths, other.fan_in):
            raise UserError(f"neuron sets of different models: {_shape_text(self)}, and {_shape_text(other)}")
        slices = {
            key: torch.cat([each.slices[key] for each in (self, other) if key in each.slices]).unique()
            for key in self.slices.keys() | other.slices.keys()
        }
        provenance = {"method": "union", "of": [self.provenance, other.provenance]}
        return NeuronSet(slices, self.layers, self.widths, self.fan_in, provenance)

    @property
    def count(self) -> int:
        """Slices. A channel (CANEFT) is one; an FFN unit (LAPE, LANDeRMT) is several: its rows and its column."""
        return sum(len(index) for index in self.slices.values())

    @property
    def total(self) -> int:
        """Neurons (output channels) of the whole model."""
        return self.layers * sum(self.widths.values())

    def counts(self) -> dict[tuple[str, Axis], int]:
        """Slices by projection and axis, of those that have any."""
        counts: dict[tuple[str, Axis], int] = defaultdict(int)
        for (_, projection, axis), index in self.slices.items():
            counts[projection, axis] += len(index)
        return {key: counts[key] for key in sorted(counts, key=lambda k: self._place(*k))}

    def parameters(self, bias: bool = False) -> int:
        """Trainable weights: fan_in a row (one more with its bias entry), the projection's width a column."""
        size = {"row": {p: n + bias for p, n in self.fan_in.items()}, "column": self.widths}
        return sum(count * size[axis][projection] for (projection, axis), count in self.counts().items())

    def flat(self) -> Tensor:
        """Flat numbers of the rows, int64, ascending; columns have none."""
        start, offset = 0, {}
        for projection, width in self.widths.items():
            offset[projection], start = start, start + width
        rows = [index + key[0] * start + offset[key[1]] for key, index in self.slices.items() if key[2] == "row"]
        return torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NeuronSet) and self.fingerprint == other.fingerprint

    __hash__ = None  # type: ignore[assignment]  # tensors inside: mutable

    @property
    def fingerprint(self) -> str:
        """16 hex digits over shape and slices."""
        digest = hashlib.sha256(json.dumps([self.layers, self.widths, self.fan_in]).encode())
        for key, index in self.slices.items():
            digest.update(f"{_name(key)} {len(index)} ".encode() + index.numpy().astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes safetensors: a tensor a (layer, projection, axis), named `3.gate.row`; renamed into place."""
        shape = {"layers": self.layers, "widths": self.widths, "fan_in": self.fan_in}
        metadata = {"format": FORMAT, "shape": json.dumps(shape), "provenance": json.dumps(self.provenance)}
        metadata["slicetune"] = __version__
        metadata["fingerprint"] = self.fingerprint
        tensors = {_name(key): index.clone().contiguous() for key, index in self.slices.items()}
        with whole_file(Path(path)) as unfinished:
            save_file(tensors, unfinished, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> NeuronSet:
        """Reads what `save` wrote. Raises UserError, naming the file, for anything that is not a valid set."""
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file; `slicetune select` writes it")
        if Path(path).suffix == ".json":
            raise UserError(f"{path}: a set of your own is read by NeuronSet.from_json(path, shape)")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
                shape, provenance = json.loads(metadata["shape"]), json.loads(metadata["provenance"])
                if not isinstance(provenance, dict):
                    raise ValueError("its provenance is not a table")
                slices = {_key(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            found = cls(slices, shape["layers"], shape["widths"], shape["fan_in"], provenance)
            if "fingerprint" not in metadata:
                raise ValueError("it carries no digest: an older slicetune or another program wrote it")
            if found.fingerprint != metadata["fingerprint"]:
                raise ValueError("its content changed since it was written")
            return found
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: not a neuron set ({error}); select again") from error

    def describe(self) -> str:
        """A table: slices per projection and third of the depth, shares, trainable parameters; then provenance."""
        units = any(axis == "column" for _, axis in self.counts())
        share = "slices" if units else f"of {self.total:,} neurons ({self.count / self.total:.2%})"
        weights = self.layers * sum(width * self.fan_in[projection] for projection, width in self.widths.items())
        trained = self.parameters()
        lines = [
            f"{self.count:,} {share}, {trained:,} trainable parameters ({trained / weights:.2%} of the FFNs)",
            f"{'':14}{'lower':>9}{'middle':>9}{'upper':>9}{'all':>9}{'share':>9}",
        ]
        for projection, axis in self.counts():
            row = [
                sum(len(self.slices.get((layer, projection, axis), ())) for layer in third)
                for third in thirds(self.layers)
            ]
            width = (self.widths if axis == "row" else self.fan_in)[projection]
            numbers = "".join(f"{number:>9,}" for number in (*row, sum(row)))
            lines.append(f"{f'{projection} {axis}s':14}{numbers}{sum(row) / (width * self.layers):>9.2%}")
        empty = self.layers - len({layer for layer, _, _ in self.slices})
        lines += [f"{empty} of {self.layers} layers have none and stay frozen"] if empty else []
        return "\n".join(lines + [_shorten(f"{key}: {_plain(value)}") for key, value in self.provenance.items()])


def thirds(layers: int) -> tuple[range, range, range]:
    """Lower, middle and upper layers: 0-10, 11-20 and 21-31 of 32, as in CANEFT's Fig. 4."""
    first = -(-layers // 3)
    second = max(first, 2 * layers // 3)
    return range(first), range(first, second), range(second, layers)


def _check_slice(shape: Shape, layer: int, projection: str, axis: str, index: Tensor) -> None:
    name = f"layer {layer} {projection}"
    if projection not in shape.widths:
        raise UserError(f"{name}: unknown projection; the model has {' '.join(shape.widths)}")
    if axis not in ("row", "column"):
        raise UserError(f"{name}: axis {axis!r} is neither row nor column")
    if not 0 <= layer < shape.layers:
        raise UserError(f"{name}: the model has layers 0 to {shape.layers - 1}")
    if index.dtype != torch.int64 or index.dim() != 1:
        raise UserError(f"{name}: indices are {index.dtype} {list(index.shape)}, not a list of int64")
    if len(index) > 1 and not bool((index[1:] > index[:-1]).all()):
        raise UserError(f"{name}: indices are not sorted, or one is there twice")
    width = (shape.widths if axis == "row" else shape.fan_in)[projection]
    if len(index) and not (int(index[0]) >= 0 and int(index[-1]) < width):
        bad = int(index[0]) if int(index[0]) < 0 else int(index[-1])
        raise UserError(f"{name}: index {bad} is outside 0 to {width - 1}")


def _read_json_list(path: str | os.PathLike[str]) -> list[Any]:
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(entries, list) or not entries:
        raise UserError(f'{path}: write a list of [layer, "projection", index], such as [[0, "gate", 17]]')
    return entries


def _name(key: Key) -> str:
    return f"{key[0]}.{key[1]}.{key[2]}"


def _key(name: str) -> Key:
    layer, projection, axis = name.split(".")
    if str(int(layer)) != layer:
        raise ValueError(f"{name}: the layer is not a plain number")
    return int(layer), projection, axis  # type: ignore[return-value]


def _shape_text(shape: Shape) -> str:
    return f"{shape.layers} layers of {' '.join(f'{p} {w}' for p, w in shape.widths.items())}"


def _shorten(line: str) -> str:
    return line if len(line) <= 160 else f"{line[:159]}…"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(each)}" for key, each in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
