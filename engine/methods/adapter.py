"""Adapter: two bottleneck adapters a block, behind the attention and behind the FFN; the base stays as it is.

Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP". LANDeRMT's Table 1 has it with 806 M parameters on
BLOOM-7b1, which is a width of 1640. What it is and how it is saved: bottleneck.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from ..errors import UserError
from .method import Method

if TYPE_CHECKING:
    from ..config import RunConfig
    from ..counts import Trainable
    from ..shapes import ModelShape


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
        from ..counts import Trainable, bottlenecks

        parameters = bottlenecks(shape, self.width)
        return Trainable.known(parameters, added=parameters)

    def prepare(self, model: nn.Module, neurons: None, config: RunConfig) -> None:
        """The adapters are drawn from the run's seed on every rank."""
        from ..bottleneck import insert

        model.requires_grad_(False)
        torch.manual_seed(config.seed)
        insert(model, self.width)
