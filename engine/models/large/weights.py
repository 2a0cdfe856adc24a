"""A model without its weights, and its weights from the files one at a time, for partition.py and parallel.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ...common import distributed, private
from ...common.shards import Shard, open_shard, tensor_files
from .. import folders, names

Take = Callable[[Shard, str, str, nn.Parameter], nn.Parameter]
"""What a rank keeps of a weight: from its shard, its key there, its name and the empty parameter."""


def empty(folder: Path, dtype: torch.dtype, attention: str) -> nn.Module:
    """The model in `folder` whose weights are on `meta` and whose buffers are real, on the CPU; nothing is drawn.

    `attention` is transformers' name of an implementation.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with private.without_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def fill(model: nn.Module, folder: Path, take: Take, device: torch.device | None = None) -> None:
    """Put into an `empty` model what `take` keeps of each weight, a tied one once; and the buffers.

    Without a `device` it is a collective: the first rank checks the folder for all, and buffers go to each rank's own.
    Raises UserError for a head that config.json ties and the files hold apart.
    """
    files, others = tensor_files(folder), names.aliases(model)
    check = lambda: folders.check_ties(folder, model, files)  # noqa: E731
    distributed.first(check) if device is None else check()
    keys = names.stored_names(folder, [name for name, _ in model.named_parameters()], files)
    for name, key in sorted(keys.items(), key=lambda pair: files[pair[1]]):
        with open_shard(folder / files[key]) as shard:  # anew for each: what was read of a mapped file stays in memory
            kept = take(shard, key, name, model.get_parameter(name))
        for own in (name, *others.get(name, ())):
            _put(model, own, kept)
    kept_ones = model.state_dict().keys()  # transformers computes every other buffer, though an old file has it
    for name, buffer in list(model.named_buffers()):
        if name in files and name in kept_ones:
            with open_shard(folder / files[name]) as shard:
                buffer = shard.read(name).to(buffer.dtype)
        _put(model, name, buffer.to(device or distributed.device()))


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, own = name.rpartition(".")
    setattr(model.get_submodule(owner), own, tensor)
