"""Names of torch, transformers and DeepSpeed that are not public: all that we use, in one place.

An update that changes one of them is found by tests/engine/common/test_private.py. What the kernels use lies in
kernels/common/dispatch.py.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
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
    """The attention that a loaded model runs, by transformers' name."""
    return model.config._attn_implementation


def attentions_of(architecture: type) -> dict[str, bool]:
    """Which attention a class of transformers supports: `flash`, `sdpa`, and `any` that is registered."""
    return {
        "flash": architecture._supports_flash_attn,
        "sdpa": architecture._supports_sdpa,
        "any": architecture._supports_attention_backend,
    }


def head_plan(model: nn.Module) -> dict[str, str]:
    """How tensor parallelism cuts the output head."""
    return type(model)._tp_plan or {}


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """A model that is made in here has no weights (they are on `meta`, nothing is drawn), but its buffers' values."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with no_init_weights(), init_empty_weights(include_buffers=False):
        yield


# ---------------------------------------------------------------- DeepSpeed


def deepspeed() -> Any:
    """The package, quiet, for the device that is here, without a C++ extension that it would compile for a minute."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*_tensor` is deprecated", FutureWarning)  # torch 2.13, in every collective
    return deepspeed


def freed_memory_goes_back() -> None:
    """Let the C library give large blocks back to the system when they are freed.

    glibc learns to keep them where they come and go; gathered weights do, and a CPU rank would hold two models of them.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


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


class Partitioner:
    """Cuts up parameters among the ranks, one at a time, as ZeRO-3 has them; the first rank's values count."""

    def __init__(self) -> None:
        if not deepspeed().comm.is_initialized():
            deepspeed().comm.init_distributed(dist_init_required=False)
        if not torch.cuda.is_available():
            freed_memory_goes_back()
        stage = {"stage": 3, "memory_efficient_linear": False}
        settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": stage}
        self.init = deepspeed().zero.Init(module=nn.Module(), config_dict_or_path=settings)

    def __call__(self, param: nn.Parameter) -> nn.Parameter:
        self.init._convert_to_zero_parameters([param])
        return param


@contextlib.contextmanager
def gathering(model: nn.Module, limits: dict[str, int]) -> Iterator[None]:
    """A partitioned model runs in here, forward and backward: ZeRO-3's hooks without its engine.

    `limits` are in weights, by DeepSpeed's names of the arguments.
    """
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.utils.timer import NoopTimer

    before = [(module, set(vars(module))) for module in model.modules()]
    with zero3_linear():
        hooks = DeepSpeedZeRoOffload(model, NoopTimer(), {}, overlap_comm=torch.cuda.is_available(), **limits)
        try:
            yield
            hooks.partition_all_parameters()
        finally:
            hooks.destroy()
            forget(model)
            # What it has put into a module belongs to these hooks; a later engine, or a copy, would go by it.
            for module, own in before:
                module._parameters = dict(module._parameters)
                for name in vars(module).keys() - own:
                    del vars(module)[name]


def forget(model: nn.Module) -> None:
    """Let go of a model that ran under DeepSpeed, which keeps it in a list and by each method call that it caches.

    Its parameters hold functions that hold them: its memory comes back with `collect`, once nobody else has it.
    """
    from deepspeed.runtime.zero import parameter_offload

    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module is not model]
    coordinator = parameter_offload.PartitionedParameterCoordinator
    for cell in vars(coordinator)[f"_{coordinator.__name__}__params_to_release"].__closure__:
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
    _forgotten.append(True)


_forgotten: list[bool] = []


def collect() -> None:
    """Free the models that were forgotten, if there are any (looking takes up to a second), and unused heap."""
    if _forgotten:
        _forgotten.clear()
        gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def zero3_linear() -> Iterator[None]:
    """DeepSpeed's product in the place of F.linear, which would keep a frozen layer's weight whole until its backward.

    Forward it is torch's own: DeepSpeed's adds a bias apart, which rounds otherwise. At the end torch's is back;
    DeepSpeed leaves its own for the rest of the process.
    """
    from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3

    torchs = torch.nn.functional.linear

    class Linear(LinearFunctionForZeroStage3):
        @staticmethod
        def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return torchs(x, weight, bias)

    torch.nn.functional.linear = lambda input, weight, bias=None: Linear.apply(input, weight, bias)
    try:
        yield
    finally:
        torch.nn.functional.linear = torchs


@contextlib.contextmanager
def zero3_known(model: nn.Module) -> Iterator[None]:
    """PEFT gathers a layer whose weight it reads (DoRA's) where transformers knows of ZeRO-3: as long as this lasts."""
    if not any(map(is_partitioned, model.parameters())):
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    known = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    yield
    del known


def is_partitioned(param: Tensor) -> bool:
    """Whether ZeRO-3 has cut it up among the ranks, gathered or not."""
    return hasattr(param, "ds_id")


def part_of(param: Tensor) -> Tensor:
    """This rank's part of a partitioned parameter, flat and without what pads it; any other one as it is."""
    if not is_partitioned(param):
        return param
    part = param.ds_tensor.data
    return part[: max(0, min(len(part), param.ds_numel - dist.get_rank() * len(part)))]


def shard_of(param: nn.Parameter) -> tuple[int, torch.device]:
    """Elements of this rank's part of a parameter at stage 3 (padded to the same on each rank), and its device."""
    return param.ds_tensor.ds_numel, param.ds_tensor.device


def whole_shape(param: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter, whole, whatever the stage."""
    return tuple(getattr(param, "ds_shape", param.shape))


def whole_size(param: nn.Parameter) -> int:
    """Elements of a parameter, whole, whatever the stage."""
    return getattr(param, "ds_numel", None) or param.numel()
