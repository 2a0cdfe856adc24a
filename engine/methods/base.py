"""Base: the model as it is. Nothing is scored or trained; it is decoded and measured like the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .method import Method

if TYPE_CHECKING:
    from ..counts import Trainable
    from ..shapes import ModelShape


@dataclass
class Base(Method):
    """No training: nothing to set."""

    kind: ClassVar[str] = "base"
    title: ClassVar[str] = "Base"
    selects: ClassVar[bool] = False
    trains: ClassVar[bool] = False

    def bounds(self, shape: ModelShape) -> Trainable:
        from ..counts import Trainable

        return Trainable.known(0)
