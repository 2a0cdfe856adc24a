"""Where the unquantised values of quantised layers lie: slices begin with them, and what is saved is made of them.

safetensors is imported where a file is opened: slices need torch alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...common.errors import UserError
from .layers import dequantised, layers

APART = 0.3
"""Of a weight's norm, more than quantisation moves it (nf4 9 %, fp4 12 %); two models' weights are over 100 % apart."""
RIGHT = "is this the right base model?"


@dataclass(frozen=True)
class Stored:
    """Where the unquantised values of a layer's weight lie: a shard, the key in it, and their dtype in the model."""

    file: Path
    key: str
    dtype: torch.dtype

    def whole(self) -> Tensor:
        """[out, in] on the CPU."""
        with _open(self.file) as shard:
            return shard.read(self.key).to(self.dtype)

    def part(self, axis: int, index: Tensor) -> Tensor:
        """Rows (axis 0) [k, in], or columns (axis 1) stored as rows [k, out], on the device of `index`."""
        with _open(self.file) as shard:
            found = shard.read(self.key).index_select(axis, index.cpu())
        return (found.t() if axis else found).contiguous().to(index.device, self.dtype)


def remember(model: nn.Module, folder: str | Path) -> None:
    """Tell the quantised layers of a model that somebody else has loaded where their unquantised weights lie.

    Raises UserError for a model without quantised layers, and for a folder that has not their weights: the shapes of
    all are compared, and the values of the first. A fine-tuned copy of the right model is too near to be told apart.
    """
    found = dict(layers(model))
    if not found:
        raise UserError(f"base {folder}: the model has no quantised layer, so its own weights are the base's")
    from ...common.shards import tensor_files
    from .. import names

    files = tensor_files(folder)
    keys = names.stored_names(folder, [f"{name}.weight" for name in found], files)
    dtype = model.get_input_embeddings().weight.dtype
    for name, layer in found.items():
        key = keys[f"{name}.weight"]
        with _open(Path(folder) / files[key]) as shard:
            shape = shard.entries[key].shape
        if shape != (layer.out_features, layer.in_features):
            raise UserError(f"{folder}: {key} is {shape}, the quantised {name} another: {RIGHT}")
        layer.stored = Stored(Path(folder) / files[key], key, dtype)
    name, layer = next(iter(found.items()))
    whole = layer.stored.whole().float()
    if not (dequantised(layer, torch.float32).cpu() - whole).norm() <= APART * whole.norm():
        for other in found.values():
            del other.stored  # the model is as it was
        raise UserError(f"{folder}: {keys[name + '.weight']} has other values than the quantised {name}: {RIGHT}")


def _open(file: Path) -> Any:
    from ...common.shards import open_shard

    return open_shard(file)
