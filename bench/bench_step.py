"""A training step of one model by every method: time, peak memory, saved activations, optimizer bytes.

    python bench/run.py cpu bench_step.py

All methods read the same batch of one model and are timed in turn; `floor` is the same model with everything frozen.
Peak memory is what a method alone would hold: its own weights, slices or adapters, optimizer and masks, and what a
step takes above that.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from typing import Any

import footprint
import pytest
import systems
import torch
from harness import Comparison, Contender, Wrong
from shapes import DEVICE, DTYPE, GPU, SHORT_STEP, SMALL_GPU_STEP, SMOKE, STEP, WHOLE_STEP, Load
from systems import ATTENTION, MLP, System

FIELDS = ("resident_bytes", "peak_bytes", "saved_bytes", "optimizer_bytes", "trainable")


def contender(system: System, check: Callable[[], None] | None = None) -> Contender:
    """Check, then measure memory over one step (after a first, which makes the optimizer's state)."""
    if check is not None:
        check()
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


def add_ours(comparison: Comparison, base: Any, batch: Any, load: Load) -> None:
    neurons = systems.random_neurons(load.model)

    def ours() -> Contender:
        system = systems.slices(base, batch, neurons)
        made = contender(system, lambda: systems.same_gradients(system, base, neurons))
        made.facts["note"] = f"gradients reach the optimizer in {_gradient_dtype(system)}"
        return made

    def fused_floor() -> Contender:
        return contender(systems.floor(base, batch, fuse=True))

    comparison.add("floor: forward + dX, frozen", lambda: contender(systems.floor(base, batch)), "floor")
    comparison.add("floor with our frozen FFN", fused_floor, "floor")
    comparison.add("slices 1 %", ours, "ours")


def add_lora(comparison: Comparison, base: Any, batch: Any, load: Load) -> None:
    """LoRA twice where PEFT's cast of the adapters to fp32 means something: on a half-precision model."""
    with torch.no_grad():
        loss = float(System(base, batch, []).loss())

    def make(*arguments: Any, **options: Any) -> Callable[[], Contender]:
        def built() -> Contender:
            system = systems.lora(base, batch, *arguments, **options)
            return contender(system, lambda: systems.same_loss(system, loss))

        return built

    for name, targets in (("LoRA r=8 all-linear", ATTENTION + MLP), ("LoRA r=8 MLP", MLP)):
        comparison.add(name, make(targets))
        if torch.float32 != DTYPE:
            comparison.add(f"{name}, no fp32 cast", make(targets, fp32=False))
    comparison.add("DoRA r=8 all-linear", make(ATTENTION + MLP, dora=True), "peer")

    def shira() -> Contender:
        system = systems.shira(base, batch, load.model)
        return contender(system, lambda: systems.same_loss(system, loss))

    comparison.add("SHiRA on the FFN", shira, "peer")


def add_heavy(comparison: Comparison, base: Any, batch: Any, load: Load) -> None:
    neurons = systems.random_neurons(load.model)

    def masked(fused: bool) -> Callable[[], Contender]:
        def built() -> Contender:
            system = systems.masked(base, batch, neurons, fused)
            before = [p.detach().clone() for p in system.params]
            system.step()
            for p, mask, old in zip(system.params, system.held, before, strict=True):
                if ((p != old) & (mask == 0)).any():
                    raise Wrong("a weight outside the mask changed")
            return contender(system)

        return built

    moments = ", bf16 moments" if GPU else ""
    comparison.add(f"full, fused AdamW{moments}", lambda: contender(systems.full(base, batch)))
    comparison.add(f"masked Adam over all FFN weights{moments}", masked(False))
    comparison.add(f"masked, fused Adam{moments}", masked(True))


def add_compiled(comparison: Comparison, base: Any, batch: Any, load: Load) -> None:
    """The whole model through torch.compile, and Liger's kernels under LoRA: on a GPU only."""

    def compiled(make: Callable[[], System]) -> Callable[[], Contender]:
        def built() -> Contender:
            system = make()
            system.model.forward = torch.compile(system.model.forward)
            return contender(system)

        return built

    def liger() -> Contender:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        system = systems.lora(base, batch, ATTENTION + MLP)
        _apply_liger_kernel_to_instance(model=system.model)
        return contender(system)

    if not GPU:
        return
    neurons = systems.random_neurons(load.model)
    comparison.add("slices 1 %, torch.compile", compiled(lambda: systems.slices(base, batch, neurons)), "peer")
    comparison.add(
        "LoRA r=8 all-linear, torch.compile", compiled(lambda: systems.lora(base, batch, ATTENTION + MLP)), "peer"
    )
    comparison.add("LoRA r=8 all-linear, Liger", liger, "peer")


def compare(benchmark: Any, load: Load, parts: tuple[Callable, ...], seconds: float) -> None:
    base, batch = systems.random_model(load.model), systems.batch_of(load)
    comparison = Comparison(benchmark, "step", str(load))
    for part in parts:
        part(comparison, base, batch, load)
    rows = comparison.measure(seconds)
    for name, row in rows.items():
        row["relative_to"] = "floor: forward + dX, frozen"
        assert "error" in row or all(field in row for field in FIELDS), name


def test_step(benchmark):
    """Every method, in one setting."""
    compare(benchmark, STEP, (add_ours, add_lora, add_heavy, add_compiled), 110 if not GPU else 25)


def test_short_step(benchmark):
    """Few tokens: what an optimizer over all weights costs counts for more."""
    compare(benchmark, SHORT_STEP, (add_ours, add_lora, add_heavy), 30 if not GPU else 8)


@pytest.mark.skipif(not GPU and not SMOKE, reason="all 32 layers of the 8B need a GPU")
def test_whole_model_step(benchmark):
    """All layers of the 8B: the methods that fit."""
    compare(benchmark, WHOLE_STEP, (add_ours, add_lora), 20)


def test_deepspeed_step(benchmark):
    """DeepSpeed's whole step() beside the bare optimizer's, after the same backward."""
    load = STEP
    base, batch = systems.random_model(load.model), systems.batch_of(load)
    neurons = systems.random_neurons(load.model)
    comparison = Comparison(benchmark, "optimizer step of the whole model", str(load))

    def bare() -> Contender:
        system = systems.slices(base, batch, neurons)
        return Contender(lambda: _update(system), system.gradients)

    def deepspeed() -> Contender:
        from slicetune.engine import distributed
        from slicetune.engine.config import RunConfig, TrainConfig
        from slicetune.engine.zero import ZeroEngine

        distributed.start()
        system = systems.slices(base, batch, neurons)
        system.optimizer = None
        config = RunConfig(out=tempfile.mkdtemp(), train=TrainConfig(report_to=()))
        engine = ZeroEngine(system.model, config, load.sentences, 1)
        return Contender(engine.step, lambda: engine.backward(_loss(engine, batch)))

    comparison.add("SparseColumnAdamW.step()", bare, "ours")
    comparison.add("DeepSpeed engine.step(), ZeRO 1, one rank", deepspeed)
    try:
        comparison.measure(15 if not GPU else 6)
    finally:
        from slicetune.engine import distributed

        distributed.stop()


@pytest.mark.skipif(not GPU and not SMOKE, reason="the 8B needs a GPU")
@pytest.mark.parametrize("checkpointing", [True, False])
def test_24_gb(benchmark, checkpointing):
    """The 8B with 1 % slices trains on a card of 24 GB: the allocator is not given more."""
    load = SMALL_GPU_STEP if checkpointing else SHORT_STEP
    if GPU:
        load = Load(SMALL_GPU_STEP.model, SMALL_GPU_STEP.sentences if checkpointing else 4, SMALL_GPU_STEP.length)
    how = "with" if checkpointing else "without"
    comparison = Comparison(benchmark, "24 GB", f"{load}, {how} activation checkpointing")

    def ours() -> Contender:
        if GPU:
            total = torch.cuda.get_device_properties(DEVICE).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, 24e9 / total))
        base = systems.random_model(load.model)
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            base.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
            base.train()
        made = contender(systems.slices(base, systems.batch_of(load), systems.random_neurons(load.model)))
        made.facts["reserved_bytes"] = torch.cuda.max_memory_reserved() if GPU else None
        return made

    try:
        comparison.add("slices 1 %, train", ours, "ours")
        comparison.measure(5)
    finally:
        comparison.live.clear()
        gc.collect()
        if GPU:
            torch.cuda.set_per_process_memory_fraction(1.0)


def _update(system: System) -> None:
    system.optimizer.step()
    system.optimizer.zero_grad(set_to_none=True)


def _loss(model: Any, batch: Any) -> torch.Tensor:
    from slicetune.engine.loss import target_losses

    return target_losses(model, batch).mean()


def _gradient_dtype(system: System) -> str:
    system.gradients()
    dtype = str(system.params[0].grad.dtype).removeprefix("torch.")
    system.optimizer.zero_grad()
    return dtype
