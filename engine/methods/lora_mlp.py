"""LoRA-MLP: LoRA beside the FFN's layers alone, the part of the model that CANEFT trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .lora import Lora


@dataclass
class LoraMlp(Lora):
    """Settings of the adapters, by PEFT's names."""

    kind: ClassVar[str] = "lora_mlp"
    title: ClassVar[str] = "LoRA-MLP"
    attention: ClassVar[bool] = False
