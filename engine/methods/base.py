"""Base: the model as it is. Nothing is scored or trained; it is decoded and measured like the others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from ..slices.patches import whole_patches
from .method import Method

if TYPE_CHECKING:
    from ..models.shapes import ModelShape
    from ..run.config import RunConfig
    from ..slices.patches import Patch
    from .counts import Trainable


@dataclass
class Base(Method):
    """No training: nothing to set."""

    kind: ClassVar[str] = "base"
    title: ClassVar[str] = "Base"
    selects: ClassVar[bool] = False
    trains: ClassVar[bool] = False

    def bounds(self, shape: ModelShape) -> Trainable:
        from .counts import Trainable

        return Trainable.known(0)


@dataclass
class Full(Method):
    """All parameters: nothing to set. A tied output head is the embedding, and counts once."""

    kind: ClassVar[str] = "full"
    title: ClassVar[str] = "Full"
    selects: ClassVar[bool] = False

    def bounds(self, shape: ModelShape) -> Trainable:
        from .counts import Trainable

        return Trainable.known(shape.parameters)

    def prepare(self, model: nn.Module, neurons: None, config: RunConfig) -> None:
        model.requires_grad_(True)

    def may_change(self, model: nn.Module) -> None:
        return None

    def patches(self, base: Path, neurons: None, tensors: dict[str, Tensor]) -> dict[str, Patch]:
        return whole_patches(tensors)
