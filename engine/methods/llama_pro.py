"""LLaMA Pro: copies of a few blocks, silent at first, are inserted and trained; the model is saved as a deeper one.

Wu et al. 2024, "LLaMA Pro: Progressive LLaMA with Block Expansion". With two blocks, as CANEFT's Table 1 has it, they
follow the layer in the middle and the last one. What a deeper model is: expansion.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from ..common.errors import UserError
from ..models.shapes import ModelShape
from ..slices.patches import Patch, whole_patches
from .counts import Trainable, frozen_values, needs_output
from .expansion import Expansion
from .method import Method


@dataclass
class LlamaPro(Method):
    """How many blocks are added."""

    blocks: int = 2
    """After every 1/blocks of the depth: 2 follow the layers at 1/2 and at the end."""

    kind: ClassVar[str] = "llama_pro"
    title: ClassVar[str] = "LLaMA Pro"
    selects: ClassVar[bool] = False

    @property
    def trains_whole_weights(self) -> bool:
        return True

    def expansion(self, layers: int) -> Expansion:
        if not 1 <= self.blocks <= layers:
            raise UserError(f"--method.blocks {self.blocks}: must be between 1 and the model's {layers} layers")
        return Expansion(tuple(layers * (i + 1) // self.blocks - 1 for i in range(self.blocks)))

    def bounds(self, shape: ModelShape) -> Trainable:
        """Raises UserError for a model of fewer layers, or whose copies could not be silenced."""
        needs_output(shape, self.title)
        parameters = len(self.expansion(shape.layers).after) * shape.block_parameters
        return Trainable.known(parameters, added=parameters)

    def prepare(self, model: nn.Module, chosen: None = None, **_: Any) -> None:
        model.requires_grad_(False)
        for block in self.expansion(model.config.num_hidden_layers).apply(model):
            block.requires_grad_(True)

    def patches(self, base: Path, neurons: None, tensors: dict[str, Tensor]) -> dict[str, Patch]:
        return whole_patches(tensors)

    def saved_values(self, shape: ModelShape) -> int:
        return frozen_values(shape)
