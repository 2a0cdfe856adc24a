"""What training changes in the base's tensors: name → rows, columns or the whole, with their new values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..common.checkpoint import MASTER, masters
from ..models.sites import checkpoint_sites, layer_slices
from .neurons import NeuronSet
from .written import gathered


def load_masters(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put checkpointed values into the trained parameters before DeepSpeed wraps them."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.requires_grad:
                with gathered([param], keep=True):
                    param.copy_(state[MASTER + name])


class Patch(NamedTuple):
    """New values of a part of a named tensor; `axis` None replaces the whole of it."""

    axis: str | None
    """`row`: values [k, in] (or [k] of a bias); `column`: values [k, out], column j of the weight stored as a row."""
    index: Tensor | None
    values: Tensor | Callable[[Tensor], Tensor]
    """Or, for a whole tensor, what makes them of the base's: only one is in memory at a time."""


def slice_patches(base: Path, neurons: NeuronSet, tensors: dict[str, Tensor]) -> dict[str, Patch]:
    """What the masters of trained slices change in the base: tensor name → rows or columns. Reads no weight."""
    patches = {}
    for (name, axis), index in layer_slices(checkpoint_sites(base), neurons.slices).items():
        kind = "rows" if axis == "row" else "columns"
        patches[f"{name}.weight"] = Patch(axis, index, tensors[f"{MASTER}{name}.{kind}"])
        if f"{MASTER}{name}.bias_rows" in tensors:
            patches[f"{name}.bias"] = Patch(axis, index, tensors[f"{MASTER}{name}.bias_rows"])
    return patches


def whole_patches(tensors: dict[str, Tensor]) -> dict[str, Patch]:
    """Every trained tensor in place of the base's."""
    return {name: Patch(None, None, value) for name, value in masters(tensors).items()}
