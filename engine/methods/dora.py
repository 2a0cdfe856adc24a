"""DoRA: LoRA with each output channel's length trained apart from its direction, by PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .lora import Lora


@dataclass
class Dora(Lora):
    """Settings of the adapters, by PEFT's names. One magnitude an output channel is trained besides."""

    kind: ClassVar[str] = "dora"
    title: ClassVar[str] = "DoRA"
    magnitude: ClassVar[bool] = True
