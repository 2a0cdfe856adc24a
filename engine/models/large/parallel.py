"""Decoding a model that one GPU does not hold: its layers are cut among ranks that compute every token together.

    model = load(Path("models/llama-70b"), torch.bfloat16, "sdpa", size=8)

Which layer is cut how is transformers' own plan (plan.py): by rows, each rank has some output channels, or by columns,
each rank has a summand of the output. transformers' own engine for it wants all ranks in one group, which 16 ranks and
8 key heads cannot be.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...common import distributed, private
from ...common.shards import Shard
from . import weights
from .plan import AXES


def shares(model: nn.Module) -> tuple[int, int]:
    """(number, count) of the groups of ranks that decode sentences of their own: of a whole model each rank is one."""
    size = getattr(model, "ranks_together", 1)
    return distributed.rank() // size, distributed.world() // size


def load(folder: Path, dtype: torch.dtype, attention: str, size: int) -> nn.Module:
    """This rank's part of the model in `folder`, for `size` neighbouring ranks together; every rank calls it.

    The embedding stays whole, and the output head where it is the embedding or does not divide evenly. Raises UserError
    as weights.fill does.
    """
    model, group = weights.empty(folder, dtype, attention), _group(size)
    plan, number = _plan(model, size), distributed.rank() % size

    def take(shard: Shard, key: str, name: str, empty: nn.Parameter) -> nn.Parameter:
        axis = AXES.get(plan.get(name.rpartition(".")[0], ""))
        if axis is None or axis >= empty.dim():
            whole = shard.read(key)
            own = torch.zeros_like(whole) if axis == 1 and number else whole  # a summand's bias counts once
        else:
            own = shard.part(key, axis, number, size)
        return nn.Parameter(own.to(distributed.device(), empty.dtype), requires_grad=False)

    weights.fill(model, folder, take)
    for name, kind in plan.items():
        _hook(model.get_submodule(name), kind, number, size, group)
    model.ranks_together = size
    return model


@functools.cache
def _group(size: int) -> dist.ProcessGroup:
    """Of this rank and its neighbours; a collective, once a size."""
    group, _ = dist.new_subgroups(group_size=size)
    private.same_timeout(distributed.device())
    return group


def _plan(model: nn.Module, size: int) -> dict[str, str]:
    """Full name of a linear layer → how it is cut. Whole ones are left out."""
    wild = {f"{model.base_model_prefix}.{name}": kind for name, kind in model.config.base_model_tp_plan.items()}
    wild |= private.head_plan(model)
    found = {}
    for name, module in model.named_modules():
        kind = wild.get(".".join("*" if part.isdigit() else part for part in name.split(".")))
        if kind in AXES and isinstance(module, nn.Linear):
            found[name] = kind
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if tied or model.get_output_embeddings().out_features % size:
        found.pop(head, None)
    return found


def _hook(linear: nn.Linear, kind: str, number: int, size: int, group: dist.ProcessGroup) -> None:
    """Let a cut layer take and give what the whole one does."""

    def part_of_input(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0].chunk(size, -1)[number],)

    def summed(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        dist.all_reduce(output, group=group)
        return output

    def gathered(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        parts = [torch.empty_like(output) for _ in range(size)]
        dist.all_gather(parts, output.contiguous(), group=group)
        return torch.cat(parts, -1)

    if kind == "rowwise_split_input":
        linear.register_forward_pre_hook(part_of_input)
    if kind.startswith("rowwise"):
        linear.register_forward_hook(summed)
    if kind == "colwise_gather_output":
        linear.register_forward_hook(gathered)
