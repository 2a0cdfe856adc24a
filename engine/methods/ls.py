"""LS, an ablation of LANDeRMT: only the specific units of a pair's two languages are trained; the routing stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from .landermt import Landermt


@dataclass
class Ls(Landermt):
    """Settings of detection and routing, as LANDeRMT's."""

    kind: ClassVar[str] = "ls"
    title: ClassVar[str] = "LS"
    trains_units: ClassVar[Literal["all", "general", "specific"]] = "specific"
