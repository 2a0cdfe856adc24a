"""Names of torch, transformers and DeepSpeed that are not public: all that we use, in one place.

An update that changes one of them is found by tests/engine/common/test_private.py. What the kernels use lies in
kernels/common/dispatch.py.
"""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d

# ---------------------------------------------------------------- torch


def same_timeout(device: torch.device) -> None:
    """Give every process group the default one's time-out. DeepSpeed makes groups of its own, with torch's default.

    A rank that hangs would hold the others for that long: 10 minutes on NCCL, 30 on gloo, whatever `start` was told.
    """
    ours = dist.group.WORLD._get_backend(device).options._timeout
    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(ours, group)


def destroy_groups() -> None:
    """Destroy all process groups, and let go of them, which alone ends the threads that gloo has for each.

    Such a thread frees tensors, for which it waits for the GIL. If Python ends meanwhile the thread is ended within a
    destructor, and C++ aborts the process: "terminate called without an active exception". DeepSpeed keeps the groups
    in its modules, in circles of engine and optimizer, and as defaults of functions that it defines when there is one.
    """
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None and deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
    if dist.is_initialized():
        dist.destroy_process_group()
    if backend := sys.modules.get("deepspeed.comm.torch"):
        for function in (backend.TorchBackend.barrier, backend.TorchBackend.monitored_barrier):
            kept = function.__defaults__ or ()
            function.__defaults__ = tuple(None if isinstance(value, dist.ProcessGroup) else value for value in kept)
    gc.collect()


def largest_values(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The largest absolute value of each tensor, in few launches."""
    return torch._foreach_norm(tensors, float("inf"))


def with_children(module: nn.Module, children: dict[str, nn.Module]) -> nn.Module:
    """A copy of a module with other children; the rest it shares."""
    twin = copy.copy(module)
    vars(twin)["_modules"] = children
    return twin


def unviewed(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor in this shape, and no view to autograd: what a Function returns may then be changed in place."""
    return torch.ops.aten._unsafe_view(tensor, list(shape))


def allow_variants(variants: int) -> None:
    """Let torch.compile make so many versions of one function; above its limit it would run uncompiled, silently."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, variants)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, variants)


def recompute_cheap_values() -> None:
    """Let torch.compile make an FFN's h again for the slices' gradient: left alone it keeps it."""
    torch._functorch.config.ban_recompute_materialized_backward = False


# ---------------------------------------------------------------- transformers


def attention_of(model: nn.Module) -> str:
    """The attention implementation that a loaded model runs, by transformers' name."""
    return model.config._attn_implementation


def attentions_of(architecture: type) -> dict[str, bool]:
    """Which attention a class of transformers supports: `flash`, `sdpa`, and `any` that is registered."""
    return {
        "flash": architecture._supports_flash_attn,
        "sdpa": architecture._supports_sdpa,
        "any": architecture._supports_attention_backend,
    }


# ---------------------------------------------------------------- DeepSpeed


def no_inference_extension(deepspeed: Any) -> None:
    """Not the C++ extension for inference that DeepSpeed would compile for a minute, if there is a compiler."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def zero3_leaf(module: nn.Module) -> None:
    """Let ZeRO-3 gather a module's children together with it, as deepspeed.utils.set_z3_leaf_module does."""
    module._z3_leaf = True


def link_states(optimizer: Any) -> None:
    """Link the optimizer's state to the parameters now.

    Stages 1–2 link the state of every group after group 0's first step, when no other has one; and before it there is
    none to set or to save.
    """
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._lazy_init_hp_params_optimizer_state()


def flat_partitions(optimizer: Any, groups: Sequence[Any]) -> list[tuple[Any, Tensor]]:
    """Every parameter group's fp32 flat tensors that the wrapped optimizer really updates."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3 cuts large groups into several
        of = optimizer.sub_group_to_group_id
        return [(groups[of[i]], p) for i, p in enumerate(optimizer.fp32_partitioned_groups_flat)]
    for attribute in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, attribute):
            return list(zip(groups, getattr(optimizer, attribute), strict=True))
    raise AssertionError(f"unknown DeepSpeed optimizer {type(optimizer).__name__}")


def partitioned(model: nn.Module) -> bool:
    """Whether each rank has a part of every parameter (ZeRO-3): then all ranks must run it equally often."""
    return any(hasattr(param, "ds_id") for param in model.parameters())


def shard_of(param: nn.Parameter) -> tuple[int, torch.device]:
    """Elements of this rank's part of a parameter at stage 3 (padded to the same on each rank), and its device."""
    return param.ds_tensor.ds_numel, param.ds_tensor.device


def whole_size(param: nn.Parameter) -> int:
    """Elements of a parameter, whole, whatever the stage."""
    return getattr(param, "ds_numel", None) or param.numel()
