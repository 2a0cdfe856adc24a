"""LG, an ablation of LANDeRMT: only the general units are trained; the routing stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from .landermt import Landermt


@dataclass
class Lg(Landermt):
    """Settings of detection and routing, as LANDeRMT's."""

    kind: ClassVar[str] = "lg"
    title: ClassVar[str] = "LG"
    trains_units: ClassVar[Literal["all", "general", "specific"]] = "general"
