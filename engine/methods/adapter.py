"""Adapter: two bottleneck adapters a block, behind the attention and behind the FFN; the base stays as it is.

Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP". LANDeRMT's Table 1 has it with 806 M parameters on
BLOOM-7b1, which is a width of 1640. How it is saved: export/attached.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..common.errors import UserError
from ..models.shapes import ModelShape, from_config
from ..models.sites import FFNSite, attention_output_of, find_ffns
from ..slices.frozen.products import dtype_of
from .counts import Trainable, attention_inputs, bottlenecks, frozen_values, linears, needs_output
from .lora import Lora, elsewhere, there
from .method import Method

DEVIATION = 1e-3
"""Of both weights at the start."""
ATTENTION_INPUTS = ("query_key_value", "qkv_proj", "Wqkv", "q_proj", "k_proj", "v_proj")
"""Names of layers that read the attention's input."""


@dataclass
class Adapter(Method):
    """How wide the adapters are."""

    width: int = 1640
    """Units between an adapter's two layers."""

    kind: ClassVar[str] = "adapter"
    title: ClassVar[str] = "Adapter"
    selects: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.width < 1:
            raise UserError(f"--method.width {self.width}: must be at least 1")

    def bounds(self, shape: ModelShape) -> Trainable:
        """Raises UserError for a model whose attention has no output projection behind which an adapter could stand."""
        needs_output(shape, self.title)
        parameters = bottlenecks(shape, self.width)
        return Trainable.known(parameters, added=parameters)

    def prepare(self, model: nn.Module, chosen: None = None, *, seed: int = 0, **_: Any) -> None:
        """The adapters are drawn from the run's seed on every rank."""
        model.requires_grad_(False)
        torch.manual_seed(seed)
        insert(model, self.width)

    def saved_values(self, shape: ModelShape) -> int:
        """Each of two adapters saves its input, and its units before and after the GELU."""
        return frozen_values(shape) + 2 * (shape.hidden + 2 * self.width)


@dataclass
class AdapterLora(Adapter):
    """Width of the adapters, and the settings of LoRA by PEFT's names."""

    width: int = 1576
    rank: int = 64
    alpha: float = 128.0
    """B·A counts alpha/rank times."""
    target_modules: tuple[str, ...] = ("query_key_value",)
    """Names of the attention's input projections that get LoRA (`q_proj k_proj v_proj` in a Llama). Where the model has
    none of these, all do that it has."""

    kind: ClassVar[str] = "adapter_lora"
    title: ClassVar[str] = "Adapter-LoRA"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.target_modules or not set(self.target_modules) <= set(ATTENTION_INPUTS):
            named = " ".join(self.target_modules) or "()"
            raise UserError(f"--method.target-modules {named}: name some of {' '.join(ATTENTION_INPUTS)}")
        self._lora(self.target_modules)

    def _lora(self, layers: Sequence[str]) -> Lora:
        return Lora(self.rank, self.alpha, tuple(layers))

    def layers(self, shape: ModelShape) -> list[str]:
        """Names of the layers of a block that get LoRA. Raises UserError where some of those named alone are there."""
        inputs = attention_inputs(shape)
        if not inputs:
            raise UserError(f"{shape.name}: no linear layer reads the attention's input: {self.title} needs one")
        return there(self.target_modules, list(linears(shape)), shape.name) or inputs

    def notes(self, shape: ModelShape) -> list[str]:
        taken = self.layers(shape)
        if set(taken) <= set(self.target_modules):
            return []
        what = "all that read the attention's input are taken"
        return [elsewhere(self.target_modules, shape.name, taken, what)]

    def bounds(self, shape: ModelShape) -> Trainable:
        parameters = super().bounds(shape).minimum + self._lora(self.layers(shape)).bounds(shape).minimum
        return Trainable.known(parameters, added=parameters)

    def prepare(self, model: nn.Module, chosen: None = None, *, seed: int = 0, **_: Any) -> None:
        """LoRA first: it freezes all that is not its own."""
        self._lora(self.layers(from_config(model.config))).prepare(model, seed=seed)
        insert(model, self.width)

    def saved_values(self, shape: ModelShape) -> int:
        return super().saved_values(shape) + shape.hidden


class Bottleneck(nn.Module):
    """A frozen linear layer and the adapter behind it; takes the layer's place."""

    def __init__(self, linear: nn.Linear, width: int) -> None:
        super().__init__()
        where = {"device": linear.weight.device, "dtype": dtype_of(linear)}
        self.linear = linear
        self.down = nn.Linear(linear.out_features, width, **where)
        self.up = nn.Linear(width, linear.out_features, **where)
        for part in (self.down, self.up):
            nn.init.trunc_normal_(part.weight, std=DEVIATION, a=-2 * DEVIATION, b=2 * DEVIATION)
            nn.init.zeros_(part.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y + self.up(F.gelu(self.down(y)))


def insert(model: nn.Module, width: int) -> list[Bottleneck]:
    """Put an adapter behind the output projection of every attention and FFN, in place; they alone are made trainable.

    What else requires a gradient is left as it is. Drawn from torch's generator, in the model's order.
    """
    added = []
    for name in _outputs(model, find_ffns(model)):
        adapter = Bottleneck(model.get_submodule(name), width)
        adapter.linear.requires_grad_(False)
        model.set_submodule(name, adapter)
        added.append(adapter)
    return added


def _outputs(model: nn.Module, sites: list[FFNSite]) -> list[str]:
    """Names of each block's two output projections, the attention's first."""
    names = []
    for site in sites:
        names += [f"{site.block}.{attention_output_of(model, site)}", site.layers()[-1]]
    return names
