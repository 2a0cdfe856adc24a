"""What a run may change in its base: which part of which tensor.

Methods that choose neurons: their slices. LoRA and DoRA: the layers that they were merged into. LLaMA Pro: nothing of
the base; its new blocks are set apart. LANDeRMT: its units, and what of their blocks is trained whole. Full: anything,
which is said. Next: audit.py, which holds a run to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..common.errors import UserError
from ..methods.expansion import Expansion
from ..methods.kinds import method_from
from ..methods.landermt.routes import ROUTES, Routes
from ..methods.landermt.settings import Landermt
from ..methods.method import Method
from ..models.load import config_json
from ..models.names import stored_names
from ..models.shapes import from_config
from ..models.sites import empty_model, find_ffns, layer_slices
from ..slices.neurons import NeuronSet

PACKED = "gate_up"
"""What rows of a layer that packs gate and up are counted under."""


@dataclass(frozen=True)
class Chosen:
    """The part of one tensor that may change."""

    part: str
    """What it is counted under: a projection, or a layer's name within its block."""
    slices: tuple[tuple[str, Tensor], ...] | None
    """(axis `row` or `column`, index); None: all of it."""

    def mask(self, shape: torch.Size) -> Tensor:
        if self.slices is None:
            return torch.ones((), dtype=torch.bool).expand(shape)
        mask = torch.zeros(shape, dtype=torch.bool)
        for axis, index in self.slices:
            if len(index) and int(index.max()) >= shape[0 if axis == "row" else 1]:
                raise UserError(f"the neuron set names {self.part} {axis} {int(index.max())} of {tuple(shape)}")
            mask[index if axis == "row" else (slice(None), index)] = True
        return mask


@dataclass(frozen=True)
class Scope:
    """What may change: weights of the base's tensors (by the name in its files), and blocks that are added."""

    title: str
    """The method, and what it may change, in words."""
    chosen: Mapping[str, Chosen]
    parts: tuple[str, ...] = ()
    """What is counted apart, in the order of the report."""
    expansion: Expansion | None = None
    method: Method | None = None
    """Of a run's folder."""


def scope_of(base: Path, run: Path, neurons: NeuronSet | None, keys: Mapping[str, str]) -> Scope:
    """What may change in a run; `keys` are the tensors of the base.

    Raises UserError for a run that left no model of its own, and for a neuron set of another model.
    """
    method = None if neurons is not None else run_method(run)
    if method is not None:
        _check_exports(run, method)
    if neurons is None and (method is None or method.selects) and (run / "neurons.safetensors").is_file():
        neurons = NeuronSet.load(run / "neurons.safetensors")
    name = f"{method.title}: " if method else ""
    if neurons is not None:
        chosen = chosen_weights(base, neurons, keys)
        parts = tuple(dict.fromkeys((*neurons.widths, *(each.part for each in chosen.values()))))
        parts = tuple(part for part in parts if PACKED not in parts or part not in ("gate", "up"))
        return Scope(f"{name}{neurons.count:,} chosen slices may change", chosen, parts)
    if method is None or method.selects:
        return Scope(f"{name}no neuron set, so nothing may change", {})
    if method.routes:
        return _routed_scope(base, method, Routes.load(run / ROUTES), keys)
    return _whole_scope(base, method, keys)


def _check_exports(run: Path, method: Method) -> None:
    if not method.trains:
        raise UserError(f"{run}: {method.title} trains nothing, so there is no model of its own to compare")
    if not method.merges:
        raise UserError(
            f"{run}: {method.title} keeps what it trained in attached/, beside the base: nothing to compare"
        )


def _whole_scope(base: Path, method: Method, keys: Mapping[str, str]) -> Scope:
    """What methods that choose no neurons train: whole tensors."""
    allowed = method.may_change(empty_model(base))
    if allowed is None:
        whole = dict.fromkeys(keys, Chosen("all", None))
        return Scope(f"{method.title}: everything may change, so there is nothing to prove", whole, ("all",))
    chosen = {key: Chosen(live.split(".")[-2], None) for live, key in stored_names(base, allowed, keys).items()}
    parts = tuple(sorted({each.part for each in chosen.values()}))
    expansion = method.expansion(from_config(config_json(base)).layers)
    if expansion:
        title = f"{method.title}: {len(expansion.after)} new blocks, nothing of the base may change"
        return Scope(title, chosen, parts, expansion)
    return Scope(f"{method.title}: {len(chosen)} layers that it was merged into may change", chosen, parts)


def _routed_scope(base: Path, method: Landermt, routes: Routes, keys: Mapping[str, str]) -> Scope:
    """What LANDeRMT and its ablations train: units of the routed layers, and what of their blocks is trained whole."""
    units = method.trained_units(routes, from_config(config_json(base)))
    whole = stored_names(base, method.trained_whole(routes, empty_model(base)), keys)
    chosen = chosen_weights(base, units, keys)
    chosen |= {key: Chosen(live.split(".")[-2], None) for live, key in whole.items()}
    parts = tuple(dict.fromkeys(each.part for each in chosen.values()))
    what = f"{units.count:,} slices of units and {len(whole)} whole tensors of {len(routes.layers)} layers may change"
    return Scope(f"{method.title}: {what}", chosen, parts)


def chosen_weights(base: Path, neurons: NeuronSet, keys: Mapping[str, str]) -> dict[str, Chosen]:
    """Which part of which tensor of the base belongs to the neuron set; FFNs are found in an empty copy of it."""
    empty = empty_model(base)
    sites, live = find_ffns(empty), {}
    try:
        slices = layer_slices(sites, neurons.slices)
    except UserError as error:
        raise UserError(f"{base}: {error}") from None
    roles = {s.child(role): PACKED if s.packed and role == "up" else role for s in sites for role in s.projections}
    for (name, axis), index in slices.items():
        own = (*(live[f"{name}.weight"].slices if f"{name}.weight" in live else ()), (axis, index.cpu()))
        live[f"{name}.weight"] = Chosen(roles[name], own)
        if axis == "row" and getattr(empty.get_submodule(name), "bias", None) is not None:
            live[f"{name}.bias"] = Chosen(roles[name], ((axis, index.cpu()),))
    return {key: live[name] for name, key in stored_names(base, live, keys).items()}


def run_method(run: Path) -> Method | None:
    """Which method a run's folder is of; None for a model folder."""
    try:
        stored = json.loads((run / "config.json").read_text(encoding="utf-8")).get("method")
    except (OSError, ValueError, AttributeError):
        return None
    return method_from(stored) if isinstance(stored, dict) else None
