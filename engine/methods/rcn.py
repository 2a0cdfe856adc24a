"""RCN: randomly chosen neurons, as many of each projection as CANEFT would choose from the same statistics.

So the trainable parameters are equal, and what is left of CANEFT's gain is the choice itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .caneft import Caneft

if TYPE_CHECKING:
    from ..neurons import NeuronSet
    from ..shapes import ModelShape
    from ..statistics import Statistics


@dataclass
class Rcn(Caneft):
    """Settings of the CANEFT selection whose counts are taken; --seed draws the neurons."""

    kind: ClassVar[str] = "rcn"
    title: ClassVar[str] = "RCN"

    def select(self, stats: Statistics, shape: ModelShape, seed: int) -> tuple[NeuronSet, list[str]]:
        from ..neurons import NeuronSet

        like, warnings = super().select(stats, shape, seed)
        return NeuronSet.random(like, like=like, seed=seed), warnings
