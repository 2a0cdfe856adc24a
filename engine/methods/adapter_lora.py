"""Adapter-LoRA: bottleneck adapters in every block, and LoRA beside the attention's input projections.

LANDeRMT's Table 1 calls it "adapter-based finetuning with LoRA" (Alves et al. 2023, "Steering Large Language Models for
Machine Translation with Finetuning and In-Context Learning") with 806 M parameters on BLOOM-7b1. Width and rank are a
guess that meets this number: adapters of width 1576 and LoRA r=64 on `query_key_value`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from ..errors import UserError
from .adapter import Adapter
from .lora import Lora

if TYPE_CHECKING:
    from ..config import RunConfig
    from ..counts import Trainable
    from ..shapes import ModelShape

ATTENTION_INPUTS = ("query_key_value", "q_proj", "k_proj", "v_proj")


@dataclass
class AdapterLora(Adapter):
    """Width of the adapters, and the settings of LoRA by PEFT's names."""

    width: int = 1576
    rank: int = 64
    alpha: float = 128.0
    """B·A counts alpha/rank times."""
    target_modules: tuple[str, ...] = ("query_key_value",)
    """Names of the attention's input projections that get LoRA (`q_proj k_proj v_proj` in a Llama)."""

    kind: ClassVar[str] = "adapter_lora"
    title: ClassVar[str] = "Adapter-LoRA"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.target_modules or not set(self.target_modules) <= set(ATTENTION_INPUTS):
            named = " ".join(self.target_modules) or "()"
            raise UserError(f"--method.target-modules {named}: name some of {' '.join(ATTENTION_INPUTS)}")
        self._lora()

    def _lora(self) -> Lora:
        return Lora(self.rank, self.alpha, self.target_modules)

    def bounds(self, shape: ModelShape) -> Trainable:
        from ..counts import Trainable

        parameters = super().bounds(shape).minimum + self._lora().bounds(shape).minimum
        return Trainable.known(parameters, added=parameters)

    def prepare(self, model: nn.Module, neurons: None, config: RunConfig) -> None:
        """LoRA first: it freezes all that is not its own."""
        from ..bottleneck import insert

        self._lora().prepare(model, None, config)
        insert(model, self.width)
