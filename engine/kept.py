"""What SparseColumnAdamW keeps from step to step on a GPU, so that a step costs the host little. Next: optim.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.adamw import Launches, hyper
from ..kernels.adamw_reference import Slice, rounding_key
from ..kernels.dispatch import use_triton

if TYPE_CHECKING:
    from .optim import SparseColumnAdamW

COUNT = "step"
"""The name of a parameter's count of steps in its state, as torch's."""
Member = tuple[int, dict, Tensor, dict, Tensor]
"""A parameter that takes part in a step: its number, group, itself, its state, its gradient."""


class Kept:
    """What stays from step to step on a GPU: the launches' tables, and one count of steps for all members.

    Making it anew costs a millisecond for an 8B model, using it a tenth of that. The counts are views of one tensor,
    so all are raised at once, and each is still its parameter's own `step`.
    """

    def __init__(self, optimizer: SparseColumnAdamW, slices: list[Slice], members: list[Member]) -> None:
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
        self.what = _what(active, self.params, self.entries)
        # Held, so that neither an address nor an identity becomes another's.
        self.held = [slices, views, active, [getattr(p, "slice_of", None) for p in self.params]]
        self.random = any(launch.random for launch in self.launches.launches)
        pairs = zip(slices, self.entries, strict=True)
        own = [(s.param, s.weight, *(t for key, t in entry.items() if key != COUNT)) for s, entry in pairs]
        self.tensors = [t for tensors in own for t in tensors if t is not None]
        self.pointers = [*map(Tensor.data_ptr, self.tensors)]
        self.kinds = [(grad.dtype, grad.layout) for *_, grad in members]

    def fitting(self, optimizer: SparseColumnAdamW) -> list[Tensor]:
        """The gradients of a step that these tables serve; none where anything is not what or where it was."""
        active = [group for group in optimizer.param_groups if group["active"]]
        params = [p for group in active for p in group["params"]]
        grads = [p.grad for p in params]
        if any(grad is None for grad in grads):
            params = [p for p in params if p.grad is not None]
            grads = [p.grad for p in params]
        if len(params) != len(self.params) or not use_triton(self.params[0]):
            return []
        idle = [p for group in optimizer.param_groups if not group["active"] for p in group["params"]]
        if not all(map(optimizer.state.get, idle)):
            return []  # they have no zero state yet
        same = _what(active, params, [*map(optimizer.state.get, params)]) == self.what
        same = same and [*map(Tensor.data_ptr, self.tensors)] == self.pointers
        counts = self.counts.tolist()
        same = same and [counts[i] for i in self.like] == counts
        return grads if same and [(grad.dtype, grad.layout) for grad in grads] == self.kinds else []

    def step(self, optimizer: SparseColumnAdamW, grads: list[Tensor], grad_scale: Tensor | None) -> None:
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


def _what(groups: list[dict], params: list[Tensor], entries: list[dict | None]) -> list[int]:
    """Which groups, parameters, places in weights and tensors of state they are, by identity."""
    found = [*map(id, groups), *(len(group["params"]) for group in groups), *map(id, params), *map(id, entries)]
    found += map(id, [getattr(p, "slice_of", None) for p in params])
    for entry in entries:
        found += map(id, entry.values() if entry else ())
    return found


def _rates(group: dict, count: int) -> list[float]:
    beta1, beta2 = group["betas"]
    return hyper(float(group["lr"]), float(beta1), float(beta2), group["eps"], group["weight_decay"], count)
