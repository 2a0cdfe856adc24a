"""Full: every parameter of the model is trained, embeddings, norms and output head included."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from .method import Method, whole_patches

if TYPE_CHECKING:
    from ..config import RunConfig
    from ..counts import Trainable
    from ..shapes import ModelShape
    from ..slices import Patch


@dataclass
class Full(Method):
    """All parameters: nothing to set. A tied output head is the embedding, and counts once."""

    kind: ClassVar[str] = "full"
    title: ClassVar[str] = "Full"
    selects: ClassVar[bool] = False

    def bounds(self, shape: ModelShape) -> Trainable:
        from ..counts import Trainable

        return Trainable.known(shape.parameters)

    def prepare(self, model: nn.Module, neurons: None, config: RunConfig) -> None:
        model.requires_grad_(True)

    def may_change(self, model: nn.Module) -> None:
        return None

    def patches(self, base: Path, neurons: None, tensors: dict[str, Tensor]) -> dict[str, Patch]:
        return whole_patches(tensors)
