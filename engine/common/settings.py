"""Settings as plain JSON and back, and what is asked of two such trees: are they the same, where do they differ.

A run writes `kept` to config.json, run/config.py makes a RunConfig of it again. The stages of a run and its
checkpoints keep the settings that made them and refuse others by `differences`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import Any

from .errors import UserError


def as_dict(config: Any) -> dict[str, Any]:
    """A dataclass of settings as plain JSON types, tuples as lists; one whose class has a `kind` says it first."""
    return _with_kinds(config, json.loads(json.dumps(dataclasses.asdict(config))))


def _with_kinds(config: Any, plain: dict[str, Any]) -> dict[str, Any]:
    parts = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    nested = {name: _with_kinds(part, plain[name]) for name, part in parts.items() if dataclasses.is_dataclass(part)}
    kind = getattr(type(config), "kind", None)
    return ({"kind": kind} if kind else {}) | plain | nested


def matters(stage: str, default: Any) -> Any:
    """A field of settings that matters to one stage of a run alone, or, `stage` being "", to what no stage leaves.

    A field without this mark matters to the stages that its room is about: `of_stage` says which.
    """
    return dataclasses.field(default=default, metadata={"stage": stage})


RETIRED = frozenset({"lowest_octave"})
"""Settings of older versions that decide nothing now: what they have made is still good."""

COMMAND = "command"
"""The stage of settings that a command alone reads: no run keeps them."""


def kept(config: Any) -> dict[str, Any]:
    """`as_dict` as a run keeps it: without what only a command reads (--dry-run, --gpus, --shape)."""
    marks = {field.name: field.metadata.get("stage") for field in dataclasses.fields(config)}
    return {name: value for name, value in as_dict(config).items() if marks[name] != COMMAND}


def of_stage(config: Any, stage: str) -> dict[str, Any]:
    """What of a dataclass of settings decides the result of `stage`: the fields that bear its name, or no mark."""
    marks = {field.name: field.metadata.get("stage", stage) for field in dataclasses.fields(config)}
    return {name: value for name, value in as_dict(config).items() if marks[name] == stage}


def tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples that settings have."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def fingerprint(value: Any) -> str:
    """16 hex digits of the sha256 of a JSON-able value (keys sorted): two equal settings share it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Leaves in which two nested dicts differ, as (dotted name, old value, new value)."""
    if isinstance(old, dict) and isinstance(new, dict):
        rows = []
        for key in sorted((old.keys() | new.keys()) - RETIRED):
            rows += differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
        return rows
    return [] if old == new else [(prefix, old, new)]


def table(rows: list[tuple[str, Any, Any]], most: int = 8) -> str:
    """`differences` as a line: `train.learning_rate: 1e-05 → 0.001; zero.stage: …`."""
    shown = "; ".join(f"{key}: {_short(old)} → {_short(new)}" for key, old, new in rows[:most])
    return shown + (f"; and {len(rows) - most} more" if len(rows) > most else "")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:99]}…"


def check_bounds(config: Any, part: str, bounds: dict[str, tuple[float, float]]) -> None:
    """Raises UserError, naming the flag, for a field outside its closed range, or that is no number."""
    for name, (low, high) in bounds.items():
        if not low <= getattr(config, name) <= high:  # NaN is in no range
            flag = f"--{part}.{name.replace('_', '-')} {getattr(config, name)}"
            raise UserError(f"{flag}: must be {f'{low} to {high}' if high < math.inf else f'at least {low}'}")
