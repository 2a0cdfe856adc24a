"""Ranks: start, agree, end. One path for one process and many."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .errors import UserError


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def device() -> torch.device:
    """This rank's device."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def start(timeout_minutes: float = 30.0) -> None:
    """Join the process group (NCCL on GPUs, gloo on CPUs); one process forms a group of its own.

    DeepSpeed wants a group even for one process. Without torchrun's variables the port is one that the system says is
    free, so two runs on one machine do not meet.
    """
    if dist.is_initialized():
        return
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(_free_port())
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized() and world() > 1:
        dist.barrier()


def agree(value: float, operation: str = "max") -> float:
    """The maximum, minimum or sum of a number over all ranks."""
    if not dist.is_initialized() or world() == 1:
        return value
    tensor = torch.tensor(
        value, dtype=torch.float64 if not torch.cuda.is_available() else torch.float32, device=device()
    )
    dist.all_reduce(tensor, op=getattr(dist.ReduceOp, operation.upper()))
    return float(tensor)


def sums(*values: float) -> list[float]:
    """Each number's sum over all ranks, in one collective."""
    if not dist.is_initialized() or world() == 1:
        return list(values)
    dtype = torch.float32 if torch.cuda.is_available() else torch.float64
    tensor = torch.tensor(values, dtype=dtype, device=device())
    dist.all_reduce(tensor)
    return tensor.tolist()


def collect(value: Any) -> list[Any]:
    """Every rank's value, on every rank, in the ranks' order."""
    if not dist.is_initialized() or world() == 1:
        return [value]
    box: list[Any] = [None] * world()
    dist.all_gather_object(box, value)
    return box


def share_object(value: Any) -> Any:
    """Rank 0's value on every rank."""
    if not dist.is_initialized() or world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=device())
    return box[0]


def first(work: Callable[[], Any]) -> Any:
    """The first rank's `work()`, which the others wait for (they get None); a UserError of it is raised by all."""
    result, problem = None, None
    if rank() == 0:
        try:
            result = work()
        except UserError as error:
            problem = str(error)
    problem = share_object(problem)
    if problem is not None:
        raise UserError(problem, agreed=True)
    return result


def first_rank_first(work: Callable[[], Any]) -> Any:
    """The first rank works alone (it may download or build), then the others find what it left."""
    result = first(work)
    return result if rank() == 0 else work()


def print0(*words: object) -> None:
    """Print on the first rank only."""
    if rank() == 0:
        print(*words, flush=True)


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
