"""Prove that only the chosen neurons changed: every tensor of the base against the export, bit for bit.

    python -m slicetune.engine.audit models/llama runs/caneft      # exit code 0: nothing outside changed; 1: it did

It reads the two folders and the neuron set, no live model and nothing of what training says it did.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import UserError
from .shards import match_names, open_shard, tensor_files

if TYPE_CHECKING:
    from .neurons import NeuronSet

NAMED = 5
"""Tensors that are named when something outside the neuron set differs, and positions in each."""

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Chosen:
    """The part of one tensor that may change."""

    projection: str
    slices: tuple[tuple[str, Tensor], ...]
    """(axis `row` or `column`, index)."""

    def mask(self, shape: torch.Size) -> Tensor:
        mask = torch.zeros(shape, dtype=torch.bool)
        for axis, index in self.slices:
            if len(index) and int(index.max()) >= shape[0 if axis == "row" else 1]:
                raise UserError(f"the neuron set names {self.projection} {axis} {int(index.max())} of {tuple(shape)}")
            mask[index if axis == "row" else (slice(None), index)] = True
        return mask


@dataclass(frozen=True)
class Difference:
    """Weights of one tensor that changed though nobody chose them."""

    tensor: str
    count: int
    positions: list[tuple[list[int], float, float]]
    """(index, base value, exported value) of the first few."""


@dataclass
class AuditReport:
    """What was compared and what differs; `ok` is the verdict, `str()` the text."""

    tensors: int = 0
    weights: int = 0
    allowed: Counter[str] = field(default_factory=Counter)
    """Weights of the neuron set by projection."""
    changed: Counter[str] = field(default_factory=Counter)
    """Those of them that differ from the base."""
    outside: list[Difference] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    cast: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Tensors whose dtype differs, by (base's, export's)."""
    any_chosen: bool = True
    """False where there was no neuron set."""

    @property
    def ok(self) -> bool:
        return not (self.outside or self.missing or self.extra)

    def __str__(self) -> str:
        lines = [f"{self.weights:,} weights in {self.tensors} tensors compared bit for bit"]
        for (old, new), count in sorted(self.cast.items()):
            lines.append(f"  {count} tensors are {old} in the base and {new} here: {_comparison(old, new)}")
        if not self.any_chosen:
            lines.append("  no neuron set: every difference counts as outside")
        for name, allowed in self.allowed.items():
            changed = self.changed[name]
            share = f" ({changed / allowed:.1%})" if allowed else ""
            lines.append(f"  inside, {name}: {changed:,} of {allowed:,} chosen weights changed{share}")
        lines += [f"  missing: {name}" for name in self.missing[:NAMED]]
        lines += [f"  not in the base: {name}" for name in self.extra[:NAMED]]
        for difference in self.outside[:NAMED]:
            lines.append(f"  OUTSIDE, {difference.tensor}: {difference.count:,} weights differ")
            lines += [f"    at {where}: base {old!r}, export {new!r}" for where, old, new in difference.positions]
        if self.ok:
            lines.append("  outside: none changed")
        else:
            bad = len(self.outside) + len(self.missing) + len(self.extra)
            lines.append(f"  FAILED: {bad} tensors differ from the base outside the neuron set")
        return "\n".join(lines)


def audit(
    base_dir: str | os.PathLike[str], run_dir: str | os.PathLike[str], neurons: NeuronSet | None = None
) -> AuditReport:
    """Compare `base_dir` with the model of `run_dir` (a run's folder, or a model folder itself).

    `neurons` defaults to the run's neurons.safetensors; with neither, every difference counts as outside. Tensors of
    another dtype are compared after the base's values were cast to it: exactly where it is wider, rounded where it is
    narrower. Raises UserError where a folder cannot be read or the neuron set belongs to another model.
    """
    base, run = Path(base_dir), Path(run_dir)
    if (run / "attached").is_dir():
        raise UserError(f"{run}: what was trained lies beside the base, in attached/; there are no weights to compare")
    model = run / "model" if (run / "model").is_dir() else run
    if neurons is None and model != run and (run / "neurons.safetensors").is_file():
        from .neurons import NeuronSet

        neurons = NeuronSet.load(run / "neurons.safetensors")
    ours, theirs = tensor_files(base), tensor_files(model)
    chosen = chosen_weights(base, neurons, ours) if neurons is not None else {}
    report = AuditReport(missing=sorted(ours.keys() - theirs.keys()), extra=sorted(theirs.keys() - ours.keys()))
    report.any_chosen = neurons is not None
    if neurons is not None:
        report.allowed = Counter(dict.fromkeys(neurons.widths, 0))
    pairs: dict[tuple[str, str], list[str]] = {}
    for name in ours:
        if name in theirs:
            pairs.setdefault((ours[name], theirs[name]), []).append(name)
    for (left, right), names in pairs.items():
        with open_shard(base / left) as old, open_shard(model / right) as new:
            for name in names:
                _compare(report, name, old.read(name), new.read(name), chosen.get(name))
    return report


def chosen_weights(base: Path, neurons: NeuronSet, keys: Mapping[str, str]) -> dict[str, Chosen]:
    """Which part of which tensor of the base belongs to the neuron set; FFNs are found in an empty copy of it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from .ffn import find_ffns

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    sites = {site.layer: site for site in find_ffns(empty)}
    live: dict[str, Chosen] = {}
    parts: dict[tuple[int, str], list[tuple[str, Tensor]]] = {}
    for (layer, role, axis), index in neurons.slices.items():
        if len(index):
            parts.setdefault((layer, role), []).append((axis, index.cpu()))
    for (layer, role), slices in sorted(parts.items()):
        if layer not in sites or role not in sites[layer].projections:
            raise UserError(f"{base} has no {role} projection in layer {layer}: the neuron set is of another model")
        name = f"{sites[layer].name}.{sites[layer].projections[role]}"
        live[f"{name}.weight"] = Chosen(role, tuple(slices))
        rows = tuple(part for part in slices if part[0] == "row")
        if rows and getattr(empty.get_submodule(name), "bias", None) is not None:
            live[f"{name}.bias"] = Chosen(role, rows)
    return {key: live[name] for name, key in match_names(live, keys).items()}


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
        report.allowed[chosen.projection] += int(mask.sum())
    old, new = _bits(base.to(export.dtype)), _bits(export)
    if torch.equal(old, new):
        return
    differs = old != new
    if mask is not None:
        report.changed[chosen.projection] += int((differs & mask).sum())
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


def main(arguments: list[str] | None = None) -> int:
    """`BASE RUN` → 0 if nothing outside the neuron set changed, 1 if something did, 2 if that cannot be told."""
    from .cli import one_line
    from .models import snapshot

    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 2:
        print("usage: python -m slicetune.engine.audit BASE RUN", file=sys.stderr)
        return 2
    with one_line():
        report = audit(snapshot(arguments[0]), arguments[1])
    print(report)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
