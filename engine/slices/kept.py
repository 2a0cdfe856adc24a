"""What SparseColumnAdamW keeps from step to step on a GPU, so that a step costs the host little. Next: optim.py."""

from __future__ import annotations

from itertools import chain
from operator import is_

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...kernels.adamw.op import Launches, hyper
from ...kernels.adamw.reference import Slice, rounding_key
from ...kernels.common.dispatch import use_triton

COUNT = "step"
"""The name of a parameter's count of steps in its state, as torch's."""
Member = tuple[int, dict, Tensor, dict, Tensor]
"""A parameter that takes part in a step: its number, group, itself, its state, its gradient."""


class Kept:
    """What stays from step to step on a GPU: the launches' tables, and one count of steps for all members.

    Using it takes the host a fifth of the time of making it anew (96 slices). The counts are views of one tensor,
    so all are raised at once, and each is still its parameter's own `step`.
    """

    def __init__(self, optimizer: Optimizer, slices: list[Slice], members: list[Member]) -> None:
        self.ordinals = [ordinal for ordinal, *_ in members]
        self.groups = [group for _, group, *_ in members]
        self.params = [p for _, _, p, _, _ in members]
        self.entries = [entry for *_, entry, _ in members]
        self.counts = torch.tensor([float(entry[COUNT]) for entry in self.entries])
        views = self.counts.unbind()
        for entry, count in zip(self.entries, views, strict=True):
            entry[COUNT] = count
        # A row of rates for each group and count of steps, and one of the members that has it.
        kinds = [(id(group), count) for group, count in zip(self.groups, self.counts.tolist(), strict=True)]
        self.rows = {kind: kinds.index(kind) for kind in dict.fromkeys(kinds)}
        self.like = [self.rows[kind] for kind in kinds]
        self.launches = Launches(slices, [list(self.rows).index(kind) for kind in kinds])
        active = [group for group in optimizer.param_groups if group["active"]]
        self.sizes = [len(group["params"]) for group in active]
        # The objects themselves, so that neither an address nor an identity becomes another's.
        self.objects = _objects(active, self.params, self.entries)
        self.slices = slices
        self.random = any(launch.random for launch in self.launches.launches)
        pairs = zip(slices, self.entries, strict=True)
        own = [(s.param, s.weight, *(t for key, t in entry.items() if key != COUNT)) for s, entry in pairs]
        self.tensors = [t for tensors in own for t in tensors if isinstance(t, Tensor)]  # others are its owner's
        self.pointers = [*map(Tensor.data_ptr, self.tensors)]
        self.kinds = [(grad.dtype, grad.layout) for *_, grad in members]

    def fitting(self, optimizer: Optimizer) -> list[Tensor]:
        """The gradients of a step that these tables serve; none where anything is not what or where it was."""
        active = [group for group in optimizer.param_groups if group["active"]]
        params = [p for group in active for p in group["params"]]
        grads = [p.grad for p in params]
        if any(grad is None for grad in grads):
            params = [p for p in params if p.grad is not None]
            grads = [p.grad for p in params]
        entries = [*map(optimizer.state.get, params)]
        if not all(entries) or not params or not use_triton(params[0]):
            return []
        idle = [p for group in optimizer.param_groups if not group["active"] for p in group["params"]]
        if not all(map(optimizer.state.get, idle)):
            return []  # they have no zero state yet
        objects = _objects(active, params, entries)
        same = len(objects) == len(self.objects) and all(map(is_, objects, self.objects))
        same = same and [len(group["params"]) for group in active] == self.sizes
        same = same and [*map(Tensor.data_ptr, self.tensors)] == self.pointers
        counts = self.counts.tolist()
        same = same and [counts[i] for i in self.like] == counts
        return grads if same and [(grad.dtype, grad.layout) for grad in grads] == self.kinds else []

    def step(self, optimizer: Optimizer, grads: list[Tensor], grad_scale: Tensor | None) -> None:
        """Count the step and take it."""
        if not all(map(Tensor.is_contiguous, grads)):
            grads = [grad.contiguous() for grad in grads]
        self.counts += 1
        counts = [int(count) for count in self.counts.tolist()]
        rates = [_rates(self.groups[i], counts[i]) for i in self.rows.values()]
        keys = []
        if self.random:
            keys = [rounding_key(optimizer.seed, i, n) for i, n in zip(self.ordinals, counts, strict=True)]
        self.launches.step(grads, rates, keys, grad_scale)


def _objects(groups: list[dict], params: list[Tensor], entries: list[dict]) -> list:
    """Groups, parameters, places in weights, states and their tensors: what tables are made of."""
    places = [getattr(p, "slice_of", None) for p in params]
    return [*groups, *params, *places, *entries, *chain.from_iterable(map(dict.values, entries))]


def _rates(group: dict, count: int) -> list[float]:
    beta1, beta2 = group["betas"]
    return hyper(float(group["lr"]), float(beta1), float(beta2), group["eps"], group["weight_decay"], count)
