"""Settings as plain JSON and back, and what is asked of two such trees: are they the same, where do they differ.

A run writes `as_dict` to config.json, `read_config` makes a RunConfig of it again. The stages of a run and its
checkpoints keep the settings that made them and refuse others by `differences`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from .config import RunConfig
from .errors import UserError
from .methods.kinds import METHODS
from .methods.method import Method


def as_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON types, tuples as lists; a method says its kind."""
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    if isinstance(config, Method):
        return {"kind": config.kind} | plain
    return plain | {"method": as_dict(config.method)} if isinstance(config, RunConfig) else plain


def method_from(stored: dict[str, Any]) -> Method:
    """The method that `as_dict` made plain. Raises UserError for one that this version does not know."""
    fields = _tuples(stored)
    name = fields.pop("kind", None)
    kind = METHODS.get(str(name))
    if kind is None:
        raise UserError(f"method {name!r} is unknown: this run is of another version")
    try:
        return kind(**fields)
    except TypeError as error:
        raise UserError(f"method {name}: {error}: this run is of another version") from None


def read_config(run: str | os.PathLike[str]) -> RunConfig:
    """The settings in `RUN/config.json`; what an older version did not store has its default.

    Raises UserError naming the file if it is missing or no run's.
    """
    path = Path(run) / "config.json"
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        method = dict(plain.pop("method"))
        parts: dict[str, Any] = {"method": METHODS[method.pop("kind")](**_tuples(method))}
        default = RunConfig()
        for name, value in plain.items():
            whole = isinstance(value, dict)
            parts[name] = dataclasses.replace(getattr(default, name), **_tuples(value)) if whole else value
        return RunConfig(**parts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not the settings of a run ({error}): name a run's --out") from None


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def fingerprint(value: Any) -> str:
    """16 hex digits of the sha256 of a JSON-able value (keys sorted): two equal settings share it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Leaves in which two nested dicts differ, as (dotted name, old value, new value)."""
    if isinstance(old, dict) and isinstance(new, dict):
        rows = []
        for key in sorted(old.keys() | new.keys()):
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
