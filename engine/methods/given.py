"""Given: the neurons that a user names, in one file or several; their union is trained.

python recipes/caneft_tiny.py …            # writes runs/caneft-tiny/neurons.safetensors
[[0, "gate", 17], [3, "down", 5]]          # or a JSON list of one's own: layer, projection, index
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import ClassVar

from ..common.errors import UserError
from ..models.shapes import ModelShape
from ..scoring.statistics import Statistics
from ..slices.neurons import NeuronSet
from .counts import Trainable
from .method import Method


@dataclass
class Given(Method):
    """Whose neurons."""

    files: tuple[str, ...] = ()
    """Neuron sets (.safetensors, as a run writes them) or JSON lists of [layer, "projection", index]."""

    kind: ClassVar[str] = "given"
    title: ClassVar[str] = "Given"

    @property
    def reads(self) -> tuple[str, ...]:
        return self.files

    def bounds(self, shape: ModelShape) -> Trainable:
        neurons, _ = self.select(None, shape, 0)
        return Trainable.known(neurons.parameters(shape.mlp_bias), neurons=neurons.count)

    def trains_biases(self, shape: ModelShape) -> bool:
        neurons, _ = self.select(None, shape, 0)
        return shape.mlp_bias and any(axis == "row" for _, _, axis in neurons.slices)

    def select(self, stats: Statistics | None, shape: ModelShape, seed: int) -> tuple[NeuronSet, list[str]]:
        """Raises UserError for no file, one that is not readable, and one of another model."""
        if not self.files:
            raise UserError("--method.files is empty: name a neurons.safetensors or a JSON list")
        sets = [self._read(file, shape) for file in self.files]
        return reduce(NeuronSet.union, sets), []

    @staticmethod
    def _read(file: str, shape: ModelShape) -> NeuronSet:
        if Path(file).suffix == ".json":
            return NeuronSet.from_json(file, shape)
        neurons = NeuronSet.load(file)
        if (neurons.layers, neurons.widths, neurons.fan_in) != (shape.layers, shape.widths, shape.fan_in):
            raise UserError(f"{file}: chosen for a model of another shape than {shape.name}: name another file")
        return neurons

    def how_many(self) -> str:
        return f"slices in {' '.join(self.files)}"
