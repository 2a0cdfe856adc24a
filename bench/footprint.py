"""Memory: what is held, what autograd saves, and how far a call goes above it, in bytes of tensors.

On a GPU the allocator's own counters are read. On a CPU the profiler's record of every allocation is replayed, so
that the figure is exact, repeats, and is not blurred by what malloc keeps for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def storages(*things: Any) -> dict[int, int]:
    """Address → bytes of every storage in tensors, modules, optimizers, and lists and dicts of them."""
    found: dict[int, int] = {}
    for thing in things:
        if isinstance(thing, Tensor) and thing.layout == torch.sparse_coo:
            found |= storages(thing._indices(), thing._values())
        elif isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, nn.Module):
            found |= storages(*thing.parameters(), *thing.buffers(), *_plain_tensors(thing))
        elif isinstance(thing, torch.optim.Optimizer):
            found |= storages(*thing.state.values())
        elif isinstance(thing, dict):
            found |= storages(*thing.values())
        elif isinstance(thing, list | tuple):
            found |= storages(*thing)
    return found


def _plain_tensors(module: nn.Module) -> Iterable[Any]:
    """Tensors that modules hold as plain attributes or in plain dicts (SHiRA's indices)."""
    for child in module.modules():
        yield from (value for value in vars(child).values() if isinstance(value, Tensor))
        for value in vars(child).values():
            if isinstance(value, dict):
                yield from (each for each in value.values() if isinstance(each, Tensor))


def resident(*things: Any) -> int:
    """Bytes of all distinct storages in `things`."""
    return sum(storages(*things).values())


def saved(forward: Callable[[], Tensor], *apart_from: Any) -> int:
    """Bytes that autograd saves in `forward` for the backward, each storage once; weights are not counted."""
    weights, found = storages(*apart_from), {}
    kept = []  # while they are held no address comes twice

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        found.update(storages(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    size = sum(nbytes for address, nbytes in found.items() if address not in weights)
    del output
    return size


def peak(run: Callable[[], Any]) -> int:
    """The most bytes that `run` holds at a time above what is there when it starts."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:  # torch.profiler would sort out all operators
        run()
    events = profile.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most
