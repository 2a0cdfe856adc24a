"""CANEFT: neurons whose importance |activation × gradient| carries information about every domain.

Jiang et al., "Consensus-Aligned Neuron Efficient Fine-Tuning Large Language Models for Multi-Domain Machine
Translation". Selection itself is in selection.py and information.py; this is what of it can be set.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

from ...common.errors import UserError
from ...models.shapes import ModelShape
from ...scoring.statistics import Statistics
from ...slices.neurons import NeuronSet
from ..counts import Trainable, trainable
from ..method import Method
from .selection import check_ratios, select


@dataclass
class Caneft(Method):
    """Settings of the selection; the equations are the paper's."""

    task_ratio: float | None = 0.2
    """Keep the neurons in the top share of importance first (MDMTN); None is the ablation "w/o MDMTN"."""
    task_merge: Literal["mean", "intersection", "union"] = "mean"
    """Importance of a neuron for the task: its mean over domains, or membership in every or any domain's top set."""
    consensus: Literal["specific", "one_vs_rest", "joint"] | None = "specific"
    """Eq. 10: minimum over domains of I(d), of the MI with D=d, or I(B;D) itself; None is the ablation "w/o MDCAN"."""
    bins: int = 10
    """Bins of the score (Eq. 9)."""
    binning: Literal["quantile", "equal_width"] = "quantile"
    """Quantiles of the neuron's own scores over all domains, or equal steps from its lowest to its highest score."""
    neuron_ratio: float = 0.01
    """Share of all neurons of the model that is chosen (γ follows from it)."""

    kind: ClassVar[str] = "caneft"
    title: ClassVar[str] = "CANEFT"
    scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.neuron_ratio <= 1:
            raise UserError(f"--method.neuron-ratio {self.neuron_ratio}: must be above 0 and at most 1")
        if self.task_ratio is not None and not 0 < self.task_ratio <= 1:
            raise UserError(f"--method.task-ratio {self.task_ratio}: must be above 0 and at most 1, or None")
        if self.bins < 2:
            raise UserError(f"--method.bins {self.bins}: must be at least 2")

    def bounds(self, shape: ModelShape) -> Trainable:
        return trainable(shape, self.neuron_ratio)

    def check(self, shape: ModelShape, groups: int, like: Trainable | None = None) -> None:
        super().check(shape, groups, like)
        check_ratios(shape.neurons, groups, self.neuron_ratio, self.task_ratio, self.task_merge)

    def select(self, stats: Statistics, shape: ModelShape, seed: int) -> tuple[NeuronSet, list[str]]:
        selection = select(stats, **asdict(self))
        return selection.neurons, selection.warnings

    @property
    def least_groups(self) -> int:
        return 2 if self.consensus else 1

    @property
    def leads(self) -> bool:
        return self.task_ratio is not None and self.consensus is not None

    def how_many(self) -> str:
        return f"= {100 * self.neuron_ratio:g} % of them"


@dataclass
class Rcn(Caneft):
    """Settings of the CANEFT selection whose counts are taken; --seed draws the neurons."""

    kind: ClassVar[str] = "rcn"
    title: ClassVar[str] = "RCN"

    def select(self, stats: Statistics, shape: ModelShape, seed: int) -> tuple[NeuronSet, list[str]]:
        like, warnings = super().select(stats, shape, seed)
        return NeuronSet.random(like, like=like, seed=seed), warnings

    @property
    def leads(self) -> bool:
        return False
