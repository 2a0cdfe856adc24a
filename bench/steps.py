"""Contenders of a training step: a checked system, with its memory beside its time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import apart
import checks
import footprint
import systems
import torch
from harness import Contender
from shapes import GPU, Load
from systems import ATTENTION, MLP, System
from torch import nn

from slicetune.engine.data.batching import Batch

FLOOR, OURS, LORA = "floor: forward + dX, frozen", "slices 1 %", "LoRA r=8 all-linear"
FIELDS = ("resident_bytes", "peak_bytes", "saved_bytes", "optimizer_bytes", "trainable")
Make = Callable[[], Contender]


def contender(system: System, *all_checks: Callable[[System], None]) -> Contender:
    """Check, then measure memory over one step (after a first, which makes the optimizer's state)."""
    for check in all_checks:
        check(system)
    system.step()
    held = footprint.resident(*system.everything())
    facts = {
        "saved_bytes": footprint.saved(system.loss, *system.everything()),
        "resident_bytes": held,
        "peak_bytes": held + footprint.peak(system.step),
        "optimizer_bytes": footprint.resident(system.optimizer.state) if system.optimizer else 0,
        "trainable": sum(p.numel() for p in system.params),
    }
    return Contender(system.step, facts=facts)


def loss_of(base: nn.Module, batch: Batch) -> float:
    """The untrained base's loss, which every method starts from."""
    with torch.no_grad():
        return float(System(base, batch, []).loss())


def like(base: nn.Module) -> Callable[[System], None]:
    """Checks the loss against the base's as it is then: light systems share its weights, and slices write into them."""
    return lambda system: checks.same_loss(system, loss_of(base, system.batch))


def gradients_of(base: nn.Module, neurons: Any) -> Callable[[System], None]:
    return lambda system: checks.same_gradients(system, base, neurons)


def gradient_dtype(system: System) -> str:
    system.gradients()
    dtype = str(system.params[0].grad.dtype).removeprefix("torch.")
    system.optimizer.zero_grad()
    return dtype


def liger_lora(load: Load) -> Contender:
    """LoRA on a Llama with Liger's kernels. Called in a process of its own (apart.py), which draws the same weights."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    torch.manual_seed(0)
    base, batch = systems.random_model(load.model), systems.batch_of(load)
    loss = loss_of(base, batch)  # before Liger's kernels are in it
    system = systems.lora(base, batch, ATTENTION + MLP, fp32=not GPU)
    _apply_liger_kernel_to_instance(model=system.model)
    made = contender(system, lambda system: checks.same_loss(system, loss))
    return Contender(made.run, facts=made.facts | {"note": "in a process of its own"})


def in_its_own_process(make: Make) -> Make:
    return lambda: apart.contender(make)
