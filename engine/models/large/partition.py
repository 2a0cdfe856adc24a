"""A frozen model of which each rank holds 1/ranks of every weight: DeepSpeed's ZeRO-3 without its optimizer.

    model = load(Path("models/llama-70b"), torch.bfloat16, "sdpa")     # on every rank
    with gathering(model):                                             # a module's weights are whole while it runs
        model(**batch)                                                 # every rank runs the same modules in turn

The first rank reads a weight, which is cut up before the next one is read: neither a GPU nor the host holds the model.
transformers' own way (HfDeepSpeedConfig) reads all shards into the first rank's memory before it cuts the first weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...common import distributed, private
from ...common.shards import Shard
from ..sites import BLOCK
from . import weights


def is_partitioned(model: nn.Module) -> bool:
    """Whether its weights are cut up among the ranks."""
    return any(map(private.is_partitioned, model.parameters()))


def wanted(choice: str, size: int) -> bool:
    """What --model.partition is for a command without a dry run: `auto` is on where half a GPU does not hold the model.

    `size` is the weights' in bytes; printed where `auto` is on.
    """
    if choice != "auto" or distributed.world() == 1 or not torch.cuda.is_available():
        return choice == "on"
    memory = torch.cuda.mem_get_info()[1]
    if 2 * size > memory:
        distributed.print0(
            f"partition on: the weights take {size / 1e9:.1f} GB, more than half of the GPU's {memory / 1e9:.1f}"
        )
    return 2 * size > memory


def load(folder: Path, dtype: torch.dtype, attention: str) -> nn.Module:
    """The model in `folder`, partitioned; a collective. `attention` is transformers' name of an implementation.

    The folder was checked before (folders.check). Raises UserError as weights.fill does.
    """
    model, cut = weights.empty(folder, dtype, attention), private.Partitioner()

    def take(shard: Shard, key: str, name: str, empty: nn.Parameter) -> nn.Parameter:
        kept = {"device": distributed.device(), "dtype": empty.dtype}
        whole = shard.read(key).to(**kept) if distributed.rank() == 0 else torch.empty(empty.shape, **kept)
        return cut(nn.Parameter(whole, requires_grad=False))

    weights.fill(model, folder, take)
    return model


@contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """In here a partitioned model can run: the weights of a module are whole while it does. Others are as they are.

    Fuse and attach before: the hooks are of the modules that the model has now.
    """
    if not is_partitioned(model):
        yield
        return
    with private.gathering(model, limits(model)):
        yield


def limits(model: nn.Module) -> dict[str, int]:
    """How much DeepSpeed may gather ahead and keep, in weights: a block that runs, the next one, and the output head.

    Its own defaults would hold a billion weights, which of a small model is all.
    """
    blocks: Counter[str] = Counter()
    for name, p in model.named_parameters():
        if found := BLOCK.fullmatch(name):
            blocks[f"{found[1]}{found[2]}"] += private.whole_size(p)
    head, block = private.whole_size(model.get_output_embeddings().weight), max(blocks.values())
    return {"max_live_parameters": 2 * block + head, "prefetch_bucket_size": block, "max_reuse_distance": 0}


def same_sums(model: nn.Module) -> list[Any]:
    """Put an identity before every module, as ZeRO-3's hooks do, so that a replica gives the same bits in fp32.

    A norm's input is read twice by the norm and once by the residual connection: with the identity the norm's
    two gradients are added first, without it the three are added in another order. (In bf16 the norm's cast to fp32 is
    such a node already.) Returns the hooks' handles.
    """
    if next(model.parameters()).dtype == torch.bfloat16:
        return []

    def identity(module: nn.Module, args: tuple) -> tuple:
        return tuple(a.view_as(a) if isinstance(a, Tensor) and a.requires_grad else a for a in args)

    return [module.register_forward_pre_hook(identity) for module in model.modules()]
