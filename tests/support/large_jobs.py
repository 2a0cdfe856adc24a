"""What two ranks do with a model that they share: loaded in parts, run, decoded (test_large.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from slicetune.engine.common import distributed, private
from slicetune.engine.models.config import ModelConfig
from slicetune.engine.models.large import parallel
from slicetune.engine.models.large.partition import gathering
from slicetune.engine.models.load import load_model, ranks_together


def shared(folder: str, held: str) -> nn.Module:
    return load_model(folder, ModelConfig(attention="eager"), torch.device("cpu"), held=held)


def logits(folders: list[str], held: str, ids: torch.Tensor) -> list[tuple[torch.Tensor, dict[str, Any], int]]:
    """Of each model: its logits of `ids`, its buffers, and how many weights this rank has."""
    found = []
    for folder in folders:
        model = shared(folder, held)
        with gathering(model), torch.no_grad():
            result = model(input_ids=ids, use_cache=False).logits
        own = sum(private.part_of(p).numel() for p in model.parameters())
        found.append((result, dict(model.named_buffers()), own))
    return found


def together(folders: list[str]) -> list[int]:
    return [ranks_together(__import__("pathlib").Path(folder)) for folder in folders]
