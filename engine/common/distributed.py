"""Ranks: start, agree, end. One path for one process and many."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import launcher, private
from .errors import UserError


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world() -> int:
    """Ranks of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world()))


def device() -> torch.device:
    """This rank's device."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def gpu_memory() -> tuple[int | None, int | None]:
    """Bytes of a GPU, and those of them that this process can take: the least of all ranks, which decide alike.

    None and None without a GPU. What torch keeps for its next tensors counts as free: one process can make several runs
    (compare).
    """
    if not torch.cuda.is_available():
        return None, None
    free, size = torch.cuda.mem_get_info()
    return int(agree(size, "min")), int(agree(free + torch.cuda.memory_reserved(), "min"))


def start(timeout_minutes: float = 30.0) -> None:
    """Join the process group (NCCL on GPUs, gloo on CPUs); one process forms a group of its own.

    DeepSpeed wants a group even for one process. Without torchrun's variables the port is one that the system says is
    free, so two runs on one machine do not meet. Raises UserError as launcher.check does, and for a
    port in use.
    """
    if dist.is_initialized():
        return
    launcher.check(os.environ)
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(_free_port())
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    try:
        store = _agents_store(timeout) if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else None
        named = {} if store is None else {"store": store, "rank": rank(), "world_size": world()}
        dist.init_process_group(backend, timeout=timeout, **named)
    except dist.DistNetworkError as error:
        if "in use" not in str(error):
            raise
        port = os.environ["MASTER_PORT"]
        raise UserError(f"MASTER_PORT {port}: the port is in use: name another, or torchrun --standalone") from None


def _agents_store(timeout: timedelta) -> dist.Store:
    """torchrun's store, behind a prefix of this start's own.

    The agent keeps one store for all of its restarts, and torch 2.13 puts nothing before the keys: a rank that starts
    again can read the address that a dead one left there, and hang or fail (pytorch issue 135712).
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, world(), is_master=False, timeout=timeout)
    return dist.PrefixStore(agree_on_start(store, rank(), world(), timeout.total_seconds()), store)


def agree_on_start(store: dist.Store, rank: int, world: int, seconds: float) -> str:
    """A name for this start of all ranks that no earlier start had, though earlier keys are still in the store.

    The first rank shows a new name; each other one answers with it and a ticket of its own; the first rank then
    publishes the tickets. Who finds its own ticket there knows that the name is new. Raises RuntimeError after
    `seconds`.
    """
    mine, end = uuid.uuid4().hex, time.monotonic() + seconds
    tickets = {0: mine}
    if rank == 0:
        store.set("start", mine)
    while True:
        if rank == 0:
            for other in range(1, world):
                answer = store.get(f"ticket {other}").decode().split() if store.check([f"ticket {other}"]) else []
                tickets |= {other: answer[1]} if answer[:1] == [mine] else {}
            if len(tickets) == world:
                store.set("tickets", " ".join(tickets[r] for r in range(world)))
                return mine
        elif store.check(["start"]):
            store.set(f"ticket {rank}", f"{store.get('start').decode()} {mine}")
            published = store.get("tickets").decode().split() if store.check(["tickets"]) else []
            if mine in published:
                return published[0]
        if time.monotonic() > end:
            raise RuntimeError(f"timed out waiting for all {world} ranks to start")
        time.sleep(0.02)


def stop() -> None:
    """Leave the process group, together with the other ranks, and end its threads while Python still runs.

    What a rank was to do is done: one that has gone already takes nothing from the others.
    """
    if dist.is_initialized():
        with suppress(RuntimeError):
            barrier()
            private.destroy_groups()


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


def largest(value: Tensor) -> Tensor:
    """The maximum of a number over all ranks, in place; nothing waits for the device."""
    if dist.is_initialized() and world() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def sums(*values: float) -> list[float]:
    """Each number's sum over all ranks, in one collective."""
    if not dist.is_initialized() or world() == 1:
        return list(values)
    dtype = torch.float32 if torch.cuda.is_available() else torch.float64
    tensor = torch.tensor(values, dtype=dtype, device=device())
    dist.all_reduce(tensor)
    return tensor.tolist()


def add_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Sum each tensor over the ranks, in place (a collective); nothing where torch.distributed is not initialised.

    NCCL takes tensors of the host by way of the GPU, one after the other.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    nccl = dist.get_backend() == "nccl"
    for tensor in tensors:
        part = tensor.to(torch.device("cuda", torch.cuda.current_device())) if nccl else tensor
        dist.all_reduce(part)
        if part is not tensor:
            tensor.copy_(part)


def exchange(parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Give parts[r], bytes (uint8 [any]), to rank r; returns what each rank gave to this one, on `device()`.

    A collective: sizes[r] says how many bytes rank r gives; nothing is exchanged to find that out.
    """
    sent = torch.cat([part.reshape(-1).to(device()) for part in parts])
    received = torch.empty(sum(sizes), dtype=torch.uint8, device=sent.device)
    dist.all_to_all_single(received, sent, list(sizes), [part.numel() for part in parts])
    return list(received.split(list(sizes)))


def hand_to_first(owner: int, tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    """Rank `owner`'s tensor, of that shape and type, on the first rank; None on all others. Each of the two calls it.

    Only the owner gives a tensor.
    """
    if owner == 0 or rank() not in (0, owner):
        return tensor if rank() == 0 else None
    if rank() == owner:
        assert tensor is not None, "the owner has nothing to give"
        dist.send(tensor.to(device()).contiguous(), dst=0)
        if device().type == "cuda":  # NCCL only queues it: many copies of host tensors would wait on the GPU
            torch.cuda.current_stream().synchronize()
        return None
    received = torch.empty(tuple(shape), dtype=dtype, device=device())
    dist.recv(received, src=owner)
    return received


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
