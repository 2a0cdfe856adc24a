"""Base: the model as it is. Nothing is scored or trained; it is decoded and measured like the others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from ..models.shapes import ModelShape
from ..slices.patches import Patch, whole_patches
from .counts import Trainable, block_values, frozen_values
from .method import Method


@dataclass
class Base(Method):
    """No training: nothing to set."""

    kind: ClassVar[str] = "base"
    title: ClassVar[str] = "Base"
    selects: ClassVar[bool] = False
    trains: ClassVar[bool] = False

    def bounds(self, shape: ModelShape) -> Trainable:
        return Trainable.known(0)

    @property
    def is_base(self) -> bool:
        return True


@dataclass
class Full(Method):
    """All parameters: nothing to set. A tied output head is the embedding, and counts once."""

    kind: ClassVar[str] = "full"
    title: ClassVar[str] = "Full"
    sums_head: ClassVar[bool] = True
    selects: ClassVar[bool] = False

    def bounds(self, shape: ModelShape) -> Trainable:
        return Trainable.known(shape.parameters)

    def prepare(self, model: nn.Module, chosen: None = None, **_: Any) -> None:
        model.requires_grad_(True)

    @property
    def trains_whole_weights(self) -> bool:
        return True

    def may_change(self, model: nn.Module) -> None:
        return None

    def patches(self, base: Path, neurons: None, tensors: dict[str, Tensor]) -> dict[str, Patch]:
        return whole_patches(tensors)

    def saved_values(self, shape: ModelShape) -> int:
        return frozen_values(shape) + block_values(shape)
