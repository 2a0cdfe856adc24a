"""LANDeRMT: the layers that respond to a language pair, their units by language, trained and routed by pair.

Zhu et al., "LANDeRMT: Detecting and Routing Language-Aware Neurons for Selectively Finetuning LLMs to Machine
Translation". Detection's mathematics is in `awareness.py`, what it finds in `routes.py`; this is what of it can be set.
How |∂L/∂h·h| is reduced over a sentence's tokens is --score.token-reduce, as for CANEFT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from decimal import ROUND_FLOOR, Decimal
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch

from ...common.errors import UserError
from ...models.shapes import ModelShape
from ...models.sites import find_ffns
from ...slices.neurons import NeuronSet
from ...slices.patches import Patch, whole_patches
from ..counts import Trainable, block_values, frozen_values, unit_weights
from ..method import Method
from .awareness import general_share, owners, relevant
from .detection import SCORES, Detection
from .patches import patches
from .routes import ROUTES, Routes
from .routing import attach, owned_units

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn


class Split(NamedTuple):
    """Units of one layer: for all languages, each for one, and in no pair."""

    general: int
    specific: int
    nobody: int


@dataclass
class Landermt(Method):
    """Settings of detection and routing; the equations are the paper's."""

    k: int = 4
    """Layers of largest D (Eq. 2) that are trained and routed; the model's number of layers takes all."""
    layers: Literal["shared", "per_pair"] = "shared"
    """The layers of largest D averaged over pairs, for all of them, or each pair its own ("for each language
    direction", Sec. 4.4)."""
    activation: Literal["scalar", "vector"] = "scalar"
    """A of Eq. 1: h averaged over units and tokens, or the FFN's output, whose difference is taken by its norm."""
    epsilon: float = 0.9
    """Share of a layer's units that is general (Eq. 5)."""
    general_split: Literal["lowest_variance", "literal"] = "lowest_variance"
    """General are the ⌊ε·p⌋ units of lowest variance over languages, or, Eq. 5 with Sec. 3.2's descending sort to the
    letter, those below its ⌊ε·p⌋-th variance from the top: 10 % general, 90 % specific."""
    awareness_floor: float = 0.0
    """Leave out this share of a layer's units, those of lowest highest awareness ("unactivated", Sec. 1)."""
    car: Literal["general_share", "literal", "learned", "none"] = "general_share"
    """Factor of the general units: their share of awareness, what remains to 1 for the specific ones; `literal` swaps
    the two, as Eq. 6 prints them; `learned` trains the share from there; `none` is 1 for all that take part."""
    car_site: Literal["input", "output"] = "input"
    """The factor scales the FFN's input (Eq. 7-8), or its units' outputs ("proportion of the outputs", Sec. 3.3)."""
    share_rate: float = 100.0
    """With --method.car learned: the learning rate of the shares' logits, as a multiple of --train.learning-rate."""
    attention: bool = False
    """Train the rest of the chosen blocks too, in the general group (the paper's 805 M on BLOOM-7b1)."""

    kind: ClassVar[str] = "landermt"
    title: ClassVar[str] = "LANDeRMT"
    scores: ClassVar[bool] = True
    selects: ClassVar[bool] = False
    routes: ClassVar[bool] = True
    reads_all_tokens: ClassVar[bool] = True
    trains_units: ClassVar[Literal["all", "general", "specific"]] = "all"
    """Of the units that take part; the ablations LS and LG train one kind."""
    routed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"--method.k {self.k}: must be at least 1")
        if not 0 <= self.epsilon <= 1:
            raise UserError(f"--method.epsilon {self.epsilon}: must be 0 to 1")
        if not 0 <= self.awareness_floor < 1:
            raise UserError(f"--method.awareness-floor {self.awareness_floor}: must be at least 0 and below 1")
        if not 0 < self.share_rate < math.inf:
            raise UserError(f"--method.share-rate {self.share_rate}: must be above 0")

    def routes_of(self, detection: Detection) -> Routes:
        """Layers, owners and shares of every pair. Raises UserError where the model has fewer than k layers."""
        phi, relevance = detection.awareness, detection.relevance(self.activation)
        self.check_depth(phi.shape[1])
        takes = relevant(relevance, self.k, self.layers == "per_pair")
        layers = takes.any(0).nonzero().flatten().tolist()
        own = torch.tensor([[name in pair.split("-") for name in detection.languages] for pair in detection.pairs])
        owner = [self.owners(phi[:, layer]) for layer in layers]
        share = torch.stack([general_share(phi[:, i], o, own) for i, o in zip(layers, owner, strict=True)], 1)
        sentences = dict(zip(detection.languages, detection.sentences.tolist(), strict=True))
        about = {"method": self.kind, "options": asdict(self), "relevance": relevance.tolist(), "sentences": sentences}
        return Routes(
            pairs=detection.pairs,
            languages=detection.languages,
            layers=tuple(layers),
            takes=takes[:, layers],
            owner=torch.stack(owner),
            share=(1 - share if self.car == "literal" else share).to(torch.float32),
            car=self.car,
            site=self.car_site,
            total_layers=phi.shape[1],
            intermediate=phi.shape[2],
            provenance=about,
        )

    def owners(self, phi: Tensor) -> Tensor:
        """int16 [units] of one layer (Eq. 5), phi float64 [languages, units]: awareness.owners with these counts."""
        general, _, nobody = self.split(phi.shape[1])
        return owners(phi, general, nobody)

    def split(self, units: int) -> Split:
        """How many of a layer's `units` are general, specific and nobody's (Eq. 5): counts are rounded down."""
        nobody = _floor(self.awareness_floor, units)
        taken = _floor(self.epsilon, units - nobody)
        general = taken if self.general_split == "lowest_variance" else units - nobody - taken
        return Split(general, units - nobody - general, nobody)

    def bounds(self, shape: ModelShape) -> Trainable:
        """Weights of the trained units of k layers, and with `attention` the rest of these blocks.

        With `per_pair` layers they are those of k layers at least, if all pairs agree, which counts as expected too,
        and of all layers at most. Raises UserError where the model has fewer than k layers, or cannot be routed.
        """
        self.check_depth(shape.layers)
        self.check_ffn(shape)
        general, specific, _ = self.split(shape.intermediate)
        units = general * (self.trains_units != "specific") + specific * (self.trains_units != "general")
        rest = shape.block_parameters - shape.intermediate * unit_weights(shape)
        layer = units * unit_weights(shape) + rest * (self.attention and self.trains_units != "specific")
        if self.layers == "shared" or self.k == shape.layers:
            return Trainable.known(self.k * layer, neurons=self.k * units)
        return Trainable(self.k * units, self.k * layer, self.k * layer, shape.layers * layer)

    def check(self, shape: ModelShape, groups: int, like: Trainable | None = None) -> None:
        super().check(shape, groups, like)
        if not self.bounds(shape).maximum:
            settings = f"--method.epsilon {self.epsilon} --method.awareness-floor {self.awareness_floor}"
            left = f"leave no unit of {shape.intermediate:,} a layer that {self.title} trains"
            raise UserError(f"{settings} (--method.general-split {self.general_split}) {left}: change one of them")

    def check_depth(self, layers: int) -> None:
        """Raises UserError where the model has fewer than k layers."""
        if self.k > layers:
            raise UserError(f"--method.k {self.k}: the model has {layers} layers")

    def check_ffn(self, shape: ModelShape) -> None:
        """Raises UserError for FFNs that cannot be routed: their units' gains would have to reach into one layer."""
        if shape.packed or (shape.gated and shape.mlp_bias):
            what = "packs gate and up in one layer" if shape.packed else "has biases in a gated FFN"
            raise UserError(f"{shape.name} {what}: {self.title} cannot route it; CANEFT, LAPE and Layers train it")

    def prepare(
        self, model: nn.Module, chosen: Routes, *, groups: Sequence[str], recompute: bool = False, **_: Any
    ) -> None:
        """Route the model and make the slices of every owner trainable."""
        attach(model, chosen, groups, self.trains_units, self.attention, self.share_rate, recompute)

    def trained_units(self, routes: Routes, shape: ModelShape) -> NeuronSet:
        """The units that training changed, as audit.py holds a run to them."""
        slices = {}
        for position, layer in enumerate(routes.layers):
            units = [index for index, _ in owned_units(routes, position, self.trains_units).values()]
            if units:
                *first, last = shape.widths
                index = torch.cat(units).sort().values
                slices |= {(layer, role, "row"): index for role in first} | {(layer, last, "column"): index}
        return NeuronSet(slices, shape.layers, shape.widths, shape.fan_in)

    def trained_whole(self, routes: Routes, model: nn.Module) -> set[str]:
        """Names of the tensors that training changed as a whole; `model` may be without memory."""
        sites, found = find_ffns(model), set()
        for site in (sites[layer] for layer in routes.layers if self.attention and self.trains_units != "specific"):
            *first, last = (f"{site.name}.{child}" for child in site.projections.values())
            slices = {f"{name}.{kind}" for name in first for kind in ("weight", "bias")} | {f"{last}.weight"}
            found |= block_tensors(model, site.block) - slices
        return found

    def patches(self, base: Path, routes: Routes, tensors: dict[str, Tensor]) -> dict[str, Patch]:
        return patches(base, routes, tensors, self.trains_units)

    @property
    def trains_whole_weights(self) -> bool:
        return self.attention and self.trains_units != "specific"

    @property
    def leaves_delta(self) -> bool:
        return self.routed and not self.attention

    @property
    def statistics_file(self) -> str:
        return SCORES

    @property
    def chosen_file(self) -> str:
        return ROUTES

    def load_chosen(self, run: Path) -> Routes:
        return Routes.load(run / ROUTES)

    def saved_values(self, shape: ModelShape) -> int:
        """Of k blocks the mean over all, as if each were trained whole."""
        return frozen_values(shape) + block_values(shape) * self.k // shape.layers


@dataclass
class Layers(Landermt):
    """Settings of the choice of layers, as LANDeRMT's; those of units and routing have no effect."""

    kind: ClassVar[str] = "layers"
    title: ClassVar[str] = "Layers"
    routed: ClassVar[bool] = False

    @property
    def trains_whole_weights(self) -> bool:
        return True

    def bounds(self, shape: ModelShape) -> Trainable:
        """k blocks; with `per_pair` layers k at least, if all pairs agree, which counts as expected too."""
        self.check_depth(shape.layers)
        block = shape.block_parameters
        if self.layers == "shared" or self.k == shape.layers:
            return Trainable.known(self.k * block)
        return Trainable(0, self.k * block, self.k * block, shape.layers * block)

    def prepare(self, model: nn.Module, chosen: Routes, **_: Any) -> None:
        model.requires_grad_(False)
        sites = find_ffns(model)
        for layer in chosen.layers:
            model.get_submodule(sites[layer].block).requires_grad_(True)

    def trained_units(self, routes: Routes, shape: ModelShape) -> NeuronSet:
        return NeuronSet({}, shape.layers, shape.widths, shape.fan_in)

    def trained_whole(self, routes: Routes, model: nn.Module) -> set[str]:
        sites = find_ffns(model)
        return {name for layer in routes.layers for name in block_tensors(model, sites[layer].block)}

    def patches(self, base: Path, routes: Routes, tensors: dict[str, Tensor]) -> dict[str, Patch]:
        return whole_patches(tensors)


@dataclass
class Ls(Landermt):
    """Settings of detection and routing, as LANDeRMT's."""

    kind: ClassVar[str] = "ls"
    title: ClassVar[str] = "LS"
    trains_units: ClassVar[Literal["all", "general", "specific"]] = "specific"


@dataclass
class Lg(Landermt):
    """Settings of detection and routing, as LANDeRMT's."""

    kind: ClassVar[str] = "lg"
    title: ClassVar[str] = "LG"
    trains_units: ClassVar[Literal["all", "general", "specific"]] = "general"


def block_tensors(model: nn.Module, block: str) -> set[str]:
    """Names of all parameters of a block."""
    return {f"{block}.{name}" for name, _ in model.get_submodule(block).named_parameters()}


def _floor(share: float, total: int) -> int:
    """⌊share · total⌋ of the decimal number as it was written: 0.29 of 100 is 29."""
    return int((Decimal(repr(float(share))) * total).to_integral_value(ROUND_FLOOR))
