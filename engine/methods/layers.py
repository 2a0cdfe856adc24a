"""Layers, an ablation of LANDeRMT: all parameters of the chosen layers are trained, and nothing is routed.

With routing on a silenced unit would get no gradient, and it would be LANDeRMT again: it trains and decodes at c = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .landermt import Landermt, block_tensors
from .method import whole_patches

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from ..config import RunConfig
    from ..counts import Trainable
    from ..landermt.routes import Routes
    from ..neurons import NeuronSet
    from ..shapes import ModelShape
    from ..slices import Patch


@dataclass
class Layers(Landermt):
    """Settings of the choice of layers, as LANDeRMT's; those of units and routing have no effect."""

    kind: ClassVar[str] = "layers"
    title: ClassVar[str] = "Layers"
    routed: ClassVar[bool] = False

    def bounds(self, shape: ModelShape) -> Trainable:
        """k blocks; with `per_pair` layers k at least, if all pairs agree, which counts as expected too."""
        from ..counts import Trainable

        self.check_depth(shape.layers)
        block = shape.block_parameters
        if self.layers == "shared" or self.k == shape.layers:
            return Trainable.known(self.k * block)
        return Trainable(0, self.k * block, self.k * block, shape.layers * block)

    def prepare(self, model: nn.Module, routes: Routes, config: RunConfig) -> None:
        from ..ffn import find_ffns

        model.requires_grad_(False)
        sites = find_ffns(model)
        for layer in routes.layers:
            model.get_submodule(sites[layer].name.rpartition(".")[0]).requires_grad_(True)

    def trained_units(self, routes: Routes, shape: ModelShape) -> NeuronSet:
        from ..neurons import NeuronSet

        return NeuronSet({}, shape.layers, shape.widths, shape.fan_in)

    def trained_whole(self, routes: Routes, model: nn.Module) -> set[str]:
        from ..ffn import find_ffns

        sites = find_ffns(model)
        return {name for layer in routes.layers for name in block_tensors(model, sites[layer].name)}

    def patches(self, base: Path, routes: Routes, tensors: dict[str, Tensor]) -> dict[str, Patch]:
        return whole_patches(tensors)
