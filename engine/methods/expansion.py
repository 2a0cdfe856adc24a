"""A deeper model: copies of some blocks behind the blocks that they copy, silent until they are trained.

    new = Expansion(after=(15, 31)).apply(model)      # in place; returns the two new blocks

A copy's attention and FFN output projections are zero, so it adds nothing to the residual stream and the deeper model
equals the base exactly. Blocks are numbered from 0 in the base's order.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models.kinds import DEPTH
from ..models.sites import BLOCK, attention_output_of, find_ffns
from ..slices.written import gathered


@dataclass(frozen=True)
class Expansion:
    """Which blocks are followed by a copy of themselves, ascending."""

    after: tuple[int, ...]

    def place(self, block: int) -> int:
        """The number that block `block` of the base has in the deeper model; its copy has the next."""
        return block + sum(1 for other in self.after if other < block)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> list[nn.Module]:
        """Insert the copies; returns them. Block numbers that modules know and the config's lists follow."""
        sites = find_ffns(model)
        path = sites[0].block.rpartition(".")[0]
        silent = [[attention_output_of(model, s), s.layers()[-1].removeprefix(f"{s.block}.")] for s in sites]
        old, blocks, new = model.get_submodule(path), [], []
        for number, block in enumerate(old):
            blocks.append(block)
            if number in self.after:
                with gathered(list(block.parameters())):  # a copy of a partitioned block is whole until it is trained
                    new.append(copy.deepcopy(block))
                _silence(new[-1], silent[number])
                blocks.append(new[-1])
        for number, block in enumerate(blocks):
            for module in block.modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    module.layer_idx = number
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.ModuleList(blocks))
        for key, value in self.config(model.config.to_dict()).items():
            if value != getattr(model.config, key, value):
                setattr(model.config, key, value)
        return new

    def names(self, tensor: str) -> list[str]:
        """Where a tensor of the base goes in the deeper model: its new name, and the copy's where it has one."""
        found = BLOCK.fullmatch(tensor)
        if not found:
            return [tensor]
        head, block, rest = found[1], int(found[2]), found[3]
        places = [self.place(block), self.place(block) + 1] if block in self.after else [self.place(block)]
        return [f"{head}{place}{rest}" for place in places]

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        """A config.json of the deeper model: the number of layers, and in full what it has a layer at a time.

        A list that config.json leaves out follows from the layers' numbers (Gemma-2's windows), which have changed.
        """
        from transformers import AutoConfig

        whole = AutoConfig.for_model(**config).to_dict()
        depth = next(whole[key] for key in DEPTH if key in whole)
        deeper = config | {key: whole[key] + len(self.after) for key in DEPTH if key in whole}
        listed = {
            key: value
            for key, value in whole.items()
            if "layer" in key and isinstance(value, list) and len(value) == depth
        }
        return deeper | {
            key: [each for i, each in enumerate(value) for _ in range(2 if i in self.after else 1)]
            for key, value in listed.items()
        }


def _silence(block: nn.Module, layers: list[str]) -> None:
    """Zero what the block adds to the residual stream, biases too."""
    for linear in map(block.get_submodule, layers):
        nn.init.zeros_(linear.weight)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
