"""A model that computes with its weights on the disk: those of one block are in memory at a time.

    found = hollow(Path("models/llama"), torch.float32)
    method.prepare(found.model, chosen)       # what is trained is attached as ever
    found.stream(tensors.__getitem__)         # now found.model computes; each block reads its weights

A weight that is not there is NaN, so that a module that reads another block's weights shows in its values. Next:
live.py, which compares such a model with the export.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common.files import read_json
from ..common.shards import open_shard, tensor_files
from ..models import attention
from ..models.large import weights
from ..models.names import match
from ..models.sites import find_ffns


class Hollow:
    """The model of a folder, frozen and in evaluation mode; none of its weights is in memory."""

    def __init__(self, folder: Path, model: nn.Module, dtype: torch.dtype) -> None:
        self.folder, self.model, self.dtype = folder, model, dtype
        self.blocks = find_ffns(model)[0].block.rpartition(".")[0]
        self.files = tensor_files(folder)
        self.weights = dict(model.named_parameters())  # kept, so that no new parameter gets the id of one of them
        self.keys = {id(self.weights[name]): key for name, key in match(model, self.weights, self.files).items()}
        kept = model.state_dict().keys()  # transformers computes every other buffer, though an old file has it
        for name, buffer in model.named_buffers():
            if name in self.files and name in kept:
                buffer.copy_(self.read(name))

    def read(self, key: str) -> Tensor:
        with open_shard(self.folder / self.files[key]) as shard:
            return shard.read(key)

    def stream(self, trained: Callable[[str], Tensor], stored: torch.dtype | None = None) -> None:
        """Let it compute: `trained` gives the value of a parameter that requires a gradient, by its present name.

        Other values are the folder's, rounded to `stored` first where that is given.
        """
        own = {id(p): name for name, p in self.model.named_parameters() if p.requires_grad}

        def value(p: nn.Parameter) -> Tensor:
            if id(p) in own:
                return trained(own[id(p)]).to(self.dtype)
            values = self.read(self.keys[id(p)])
            return values.to(stored or values.dtype).to(self.dtype, copy=True)

        for module, params in self._units():  # what a method adds and does not train is in memory
            _hang(module, [p for p in params if id(p) in own or id(p) in self.keys], value)

    def _units(self) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
        """What is in memory together: a block, or a module outside of the blocks with the weights that are its own."""
        blocks = [*self.model.get_submodule(self.blocks).children()]
        inside = {id(module) for block in blocks for module in block.modules()}
        yield from ((block, [*block.parameters()]) for block in blocks)
        for module in self.model.modules():
            if id(module) not in inside and (params := [*module.parameters(recurse=False)]):
                yield module, params


def hollow(folder: Path, dtype: torch.dtype) -> Hollow:
    """The model of a Hugging Face folder in `dtype`, on the CPU. Raises UserError for a tensor that is not there."""
    attention.register()
    path = attention.attention_path("auto", torch.device("cpu"), read_json(folder / "config.json"), dtype)
    model = weights.empty(folder, dtype, path)
    _empty(model, dtype)
    model.config.use_cache = False
    return Hollow(folder, model.eval(), dtype)


def _empty(model: nn.Module, dtype: torch.dtype) -> None:
    """A NaN that has the shape of each weight in its place; a tied one stays one."""
    holes: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in [*module.named_parameters(recurse=False)]:
            if id(p) not in holes:
                hole = torch.full((), float("nan"), dtype=dtype).expand(p.shape)
                holes[id(p)] = nn.Parameter(hole, requires_grad=False)
            setattr(module, name, holes[id(p)])


def _hang(module: nn.Module, params: list[nn.Parameter], value: Callable[[nn.Parameter], Tensor]) -> None:
    """Read the values of `params` before the module computes, and let go of them after it."""
    holes = [torch.full((), float("nan"), dtype=p.dtype).expand(p.shape) for p in params]

    def fill(*_: object) -> None:
        for p in params:
            p.data = value(p)

    def empty(*_: object) -> None:
        for p, hole in zip(params, holes, strict=True):
            p.data = hole

    empty()
    module.register_forward_pre_hook(fill, prepend=True)
    module.register_forward_hook(empty, always_call=True)
