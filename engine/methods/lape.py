"""LAPE: FFN units whose activation probability differs most between groups, by the entropy over groups.

Tang et al. 2024, "Language-Specific Neurons: The Key to Multilingual Capabilities in Large Language Models", with
domains for languages, as CANEFT's Table 1 uses it. A unit is trained with its gate row, up row and down column.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..common.errors import UserError
from ..models.shapes import ModelShape
from ..scoring.statistics import Statistics
from ..slices.neurons import NeuronSet
from .counts import Trainable, share_of, unit_weights
from .method import Method


@dataclass
class Lape(Method):
    """Settings of the selection."""

    neuron_ratio: float = 0.01
    """Share of all FFN units that is chosen."""
    match: str = ""
    """A neurons.safetensors: choose as many units as come nearest to its trainable parameters instead."""
    percentile: float = 0.95
    """A unit must be active more often than this share of all (unit, domain) pairs, in one domain at least."""

    kind: ClassVar[str] = "lape"
    title: ClassVar[str] = "LAPE"
    follows: ClassVar[bool] = True
    reads_all_tokens: ClassVar[bool] = True
    scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.neuron_ratio <= 1:
            raise UserError(f"--method.neuron-ratio {self.neuron_ratio}: must be above 0 and at most 1")
        if not 0 < self.percentile < 1:
            raise UserError(f"--method.percentile {self.percentile}: must lie between 0 and 1")

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.match,) if self.match else ()

    def bounds(self, shape: ModelShape) -> Trainable:
        units = self.units(shape)
        return Trainable.known(units * unit_weights(shape), neurons=units)

    def check(self, shape: ModelShape, groups: int, like: Trainable | None = None) -> None:
        """Units that can be active often: each of these (unit, group) pairs may be of another unit, at most."""
        super().check(shape, groups, like)
        every = shape.layers * shape.intermediate
        wanted = self.units(shape) if like is None or self.match else self._as_many(like.minimum, shape)
        pairs = every * groups
        most = min(every, pairs - max(1, round(pairs * self.percentile)))
        if not 0 < wanted <= most:
            raise UserError(self._not_so_many(wanted, f"at most {most:,}"))

    def units(self, shape: ModelShape) -> int:
        """How many are chosen."""
        if not self.match:
            return share_of(self.neuron_ratio, shape.layers * shape.intermediate)
        return self._as_many(NeuronSet.load(self.match).parameters(shape.mlp_bias), shape)

    @staticmethod
    def _as_many(parameters: int, shape: ModelShape) -> int:
        """Units whose weights come nearest to so many."""
        return (2 * parameters + unit_weights(shape)) // (2 * unit_weights(shape))

    def _not_so_many(self, wanted: int, active: str) -> str:
        remedy = f"lower --method.percentile {self.percentile} or the number of units" if wanted else "raise the ratio"
        return f"lape wants {wanted:,} units, {active} are active often: {remedy}"

    def select(self, stats: Statistics, shape: ModelShape, seed: int) -> tuple[NeuronSet, list[str]]:
        """Raises UserError where only target tokens were counted, or too few units are active often enough."""
        if stats.provenance.get("score", {}).get("tokens", "all") != "all":
            raise UserError("lape counts all tokens of a sentence: set --score.tokens all")
        if len(stats.groups) < 2:
            raise UserError(f"only one group was scored, {stats.groups[0]!r}: LAPE's entropy needs two or more")
        p = stats.active.cpu().double().flatten(1) / stats.tokens.cpu()[:, None]
        bar, wanted = threshold(p, self.percentile), self.units(shape)
        often = (p > bar).any(0)
        if not 0 < wanted <= int(often.sum()):
            raise UserError(self._not_so_many(wanted, f"{int(often.sum()):,}"))
        value = entropy(p).masked_fill(~often, torch.inf)
        units = value.argsort(stable=True)[:wanted]
        owners = {name: int((p[g, units] > bar).sum()) for g, name in enumerate(stats.groups)}
        about = {"method": "lape", "options": asdict(self), "threshold": bar, "units": wanted}
        about |= {"highest_entropy": float(value[units[-1]]), "units_by_domain": owners}
        return units_of(units, shape, about), []

    @property
    def least_groups(self) -> int:
        return 2

    def how_many(self) -> str:
        if self.match:
            return f"= as many as match {self.match}"
        return f"= {100 * self.neuron_ratio:g} % of FFN units, gate and up row and down column each"

    def with_as_many(self, neurons: str) -> Lape:
        return self if self.match else replace(self, match=neurons)


def threshold(p: Tensor, percentile: float) -> float:
    """The probability at that share of all, p float64 [groups, units]; the k-th smallest, as its authors take it."""
    return p.flatten().kthvalue(max(1, round(p.numel() * percentile))).values.item()


def entropy(p: Tensor) -> Tensor:
    """-Σ_g p' ln p' in nats, p' = p / Σ_g p: p [groups, units] → [units]; a unit that is never active has 0."""
    share = p / p.sum(0).clamp_min(torch.finfo(p.dtype).tiny)
    return torch.special.entr(share).sum(0)


def units_of(units: Tensor, shape: ModelShape, provenance: dict) -> NeuronSet:
    """Slices of FFN units, numbered layer by layer: rows of what feeds them, the column of `down` that they feed."""
    *inward, outward = shape.widths
    slices = {}
    for layer in range(shape.layers):
        own = units[units // shape.intermediate == layer] % shape.intermediate
        index = own.sort().values
        slices |= {(layer, name, "row"): index.clone() for name in inward}  # a file holds no tensor twice
        slices[layer, outward, "column"] = index
    return NeuronSet(slices, shape.layers, dict(shape.widths), dict(shape.fan_in), provenance)
