"""Prove that only what a method may change did change: every tensor of the base against the export, bit for bit.

    slicetune audit runs/caneft                   # exit code 0: nothing else changed; 1: it did
    slicetune audit models/llama runs/caneft      # with a base of one's own choice
    slicetune audit models/llama trained --neurons neurons.safetensors    # what a loop of one's own has saved

It reads the two folders, the neuron set and which method it was; no live model, and nothing of what training says it
did. scope.py says what a method may change.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..common.errors import UserError
from ..common.shards import open_shard, tensor_files
from ..models.names import aliases
from ..models.sites import empty_model
from ..slices.neurons import NeuronSet
from . import beside, live
from .live import Likeness
from .scope import Chosen, run_method, scope_of

NAMED = 5
"""Tensors that are named when something outside the neuron set differs, and positions in each."""

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Difference:
    """Weights of one tensor that changed though nobody chose them."""

    tensor: str
    count: int
    positions: list[tuple[list[int], float, float]]
    """(index, base value, exported value) of the first few."""


@dataclass
class AuditReport:
    """What was compared and what differs; `ok` is the verdict, `str()` the text, whose last line says it."""

    title: str = ""
    tensors: int = 0
    weights: int = 0
    allowed: Counter[str] = field(default_factory=Counter)
    """Weights that may change, by projection or layer."""
    changed: Counter[str] = field(default_factory=Counter)
    """Those of them that differ from the base."""
    outside: list[Difference] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    cast: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Tensors whose dtype differs, by (base's, export's)."""
    new: list[str] = field(default_factory=list)
    """Tensors of added blocks."""
    new_weights: int = 0
    apart: list[str] = field(default_factory=list)
    """Keys of one tied tensor that hold other values than its first key, and did not in the base."""
    beside: list[str] = field(default_factory=list)
    """What in config.json and other files is not the base's."""
    untrained: list[str] = field(default_factory=list)
    """Tensors whose trained part does not hold the chosen checkpoint's values."""
    likeness: Likeness | None = None
    """Of the export as a user loads it to the model that was trained; None for a folder that is no run's."""

    @property
    def ok(self) -> bool:
        same = self.likeness is None or self.likeness.ok
        bad = self.outside, self.missing, self.extra, self.apart, self.beside, self.untrained
        return same and not any(bad)

    def __str__(self) -> str:
        lines = [f"{self.weights:,} weights in {self.tensors} tensors compared bit for bit"]
        for (old, new), count in sorted(self.cast.items()):
            lines.append(f"  {count} tensors are {old} in the base and {new} here: {_comparison(old, new)}")
        for name, allowed in self.allowed.items():
            changed = self.changed[name]
            share = f" ({changed / allowed:.1%})" if allowed else ""
            lines.append(f"  inside, {name}: {changed:,} of {allowed:,} weights that may change did{share}")
        if self.new:
            lines.append(f"  new: {self.new_weights:,} weights in {len(self.new)} tensors that the base does not have")
        lines += [f"  missing: {name}" for name in self.missing[:NAMED]]
        lines += [f"  not in the base: {name}" for name in self.extra[:NAMED]]
        lines += [f"  TIED, but not equal: {names}" for names in self.apart[:NAMED]]
        lines += [f"  BESIDE the weights, {line}" for line in self.beside[:NAMED]]
        lines += [f"  NOT AS TRAINED, {name}: the checkpoint has other values" for name in self.untrained[:NAMED]]
        lines += [f"  {self.likeness}"] if self.likeness else []
        for difference in self.outside[:NAMED]:
            lines.append(f"  OUTSIDE, {difference.tensor}: {difference.count:,} weights differ")
            lines += [f"    at {where}: base {old!r}, export {new!r}" for where, old, new in difference.positions]
        return "\n".join([*lines, *self._verdict()])

    def _verdict(self) -> list[str]:
        if self.ok:
            changed, allowed = self.changed.total(), self.allowed.total()
            kept = self.weights - allowed
            done = f"{changed:,} of those {allowed:,} weights changed, {kept:,} others are as in the base"
            return ["  outside: none changed", f"PASSED, {self.title}: {done}"]
        bad = len(self.outside) + len(self.missing) + len(self.extra)
        if bad or self.beside:
            what = f"{bad} tensors differ from the base otherwise" if bad else "files beside the weights differ"
        else:
            what = "the export is not the model that was trained"
        return [f"FAILED, {self.title}: {what}"]


def audit(
    base_dir: str | os.PathLike[str], run_dir: str | os.PathLike[str], neurons: NeuronSet | None = None
) -> AuditReport:
    """Compare `base_dir` with the model of `run_dir` (a run's folder, or a model folder itself).

    What may change follows from the run's method and its neurons.safetensors, or is `neurons`; of a model folder
    without them, nothing may. Tensors of another dtype are compared after the base's values were cast to it: exactly
    where it is wider, rounded where it is narrower. config.json must describe the same model (beside.py). A run's model
    is then compared with the one that was trained, as a user would load it (live.py). Raises UserError where a folder
    cannot be read, the neuron set belongs to another model, or the run trained nothing.
    """
    base, run = Path(base_dir), Path(run_dir)
    model = run / "model" if (run / "model").is_dir() else run
    ours = tensor_files(base)
    scope = scope_of(base, run, neurons, ours)
    theirs = tensor_files(model)
    places = {name: scope.expansion.names(name) if scope.expansion else [name] for name in ours}
    expected = {place for names in places.values() for place in names}
    report = AuditReport(
        title=scope.title, missing=sorted(expected - theirs.keys()), extra=sorted(theirs.keys() - expected)
    )
    report.allowed = Counter(dict.fromkeys(scope.parts, 0))
    pairs: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for name, (place, *copies) in places.items():
        report.new += [copy for copy in copies if copy in theirs]
        if place in theirs:
            pairs.setdefault((ours[name], theirs[place]), []).append((name, place))
    for (left, right), names in pairs.items():
        with open_shard(base / left) as old, open_shard(model / right) as new:
            for name, place in names:
                _compare(report, place, old.read(name), new.read(place), scope.chosen.get(name))
    report.new_weights = _weights(model, {name: theirs[name] for name in report.new})
    report.apart = sorted(_apart(model, theirs) - _apart(base, ours))
    method = run_method(run)
    report.beside = beside.changed_config(base, model, scope.expansion)
    if neurons is None and method is not None and method.merges and method.trains and model != run:
        report.beside += beside.changed_files(base, model)
        report.untrained = live.not_as_trained(base, run, method, expected)
        report.likeness = live.compare(base, run, method)
    return report


def _apart(folder: Path, files: dict[str, str]) -> set[str]:
    """Pairs of keys that are one tensor in the model, and of which the files hold two."""
    found = set()
    for name, others in aliases(empty_model(folder)).items():
        for other in (o for o in others if o in files and name in files):
            with open_shard(folder / files[name]) as left, open_shard(folder / files[other]) as right:
                if not torch.equal(_bits(left.read(name)), _bits(right.read(other))):
                    found.add(f"{name} and {other}")
    return found


def _weights(model: Path, files: dict[str, str]) -> int:
    """How many weights these tensors (name → file) have together."""
    count = 0
    for file in sorted(set(files.values())):
        with open_shard(model / file) as opened:
            count += sum(opened.entries[name].count for name, own in files.items() if own == file)
    return count


def _compare(report: AuditReport, name: str, base: Tensor, export: Tensor, chosen: Chosen | None) -> None:
    report.tensors += 1
    report.weights += base.numel()
    if base.dtype != export.dtype:
        report.cast[_name(base.dtype), _name(export.dtype)] += 1
    if base.shape != export.shape:
        report.outside.append(Difference(f"{name} {tuple(base.shape)} → {tuple(export.shape)}", export.numel(), []))
        return
    mask = chosen.mask(base.shape) if chosen else None
    if mask is not None:
        report.allowed[chosen.part] += int(mask.sum())
    old, new = _bits(base.to(export.dtype)), _bits(export)
    if torch.equal(old, new):
        return
    differs = old != new
    if mask is not None:
        report.changed[chosen.part] += int((differs & mask).sum())
        differs &= ~mask
    count = int(differs.sum())
    if count:
        first = differs.nonzero()[:NAMED].tolist()
        positions = [(where, base[tuple(where)].item(), export[tuple(where)].item()) for where in first]
        report.outside.append(Difference(name, count, positions))


def _bits(tensor: Tensor) -> Tensor:
    """The stored bits as integers, so that NaN equals itself and -0 differs from 0."""
    return tensor.contiguous().view(BITS[tensor.dtype.itemsize])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _comparison(old: str, new: str) -> str:
    wide = torch.promote_types(getattr(torch, old), getattr(torch, new))
    return "compared after exact upcast" if _name(wide) == new else f"compared after rounding the base to {new}"


def base_of(run: Path) -> str:
    """The --model.path of a run."""
    try:
        return json.loads((run / "config.json").read_text(encoding="utf-8"))["model"]["path"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{run}: no run's folder, so its base is not known: give BASE RUN") from None
