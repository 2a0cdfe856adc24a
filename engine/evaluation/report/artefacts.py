"""A run's folder, read for its report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.errors import UserError
from ...methods.kinds import METHODS
from ...slices.neurons import NeuronSet


@dataclass
class Artefacts:
    """A run folder's artefacts, read."""

    folder: Path
    config: dict[str, Any]
    results: dict[str, Any]
    metrics: list[dict[str, Any]]
    neurons: NeuronSet | None

    @classmethod
    def read(cls, folder: Path) -> Artefacts:
        if not (folder / "results.json").is_file():
            raise UserError(f"{folder}/results.json is missing: the run has no results yet; start it again to finish")
        config = folder / "config.json"
        neurons = folder / "neurons.safetensors"
        return cls(
            folder,
            json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {},
            json.loads((folder / "results.json").read_text(encoding="utf-8")),
            read_metrics(folder / "metrics.jsonl"),
            NeuronSet.load(neurons) if neurons.is_file() else None,
        )

    @property
    def method(self) -> str:
        return system_name(self.results.get("method", ""))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """metrics.jsonl by step, a step's lines merged, later ones first; a line that a kill cut short is passed over."""
    steps: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        steps[row["step"]] = steps.get(row["step"], {}) | row
    return [steps[step] for step in sorted(steps)]


def system_name(name: str) -> str:
    """How a method is written; any other system is its own name."""
    return METHODS[name].title if name in METHODS else name
