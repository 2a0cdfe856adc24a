"""What is written besides the merged model: --export.*."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class ExportConfig:
    """What is written besides the merged model."""

    adapter: Literal["none", "ranks", "one_rank"] = "none"
    """A PEFT adapter that equals the merged model: each layer with a rank of its own, or all with the largest."""
