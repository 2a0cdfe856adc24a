"""A training step of one model by every method: time, peak memory, saved activations, optimizer bytes.

    python bench/run.py cpu bench_step.py

All methods read the same batch of one model and are timed in turn; `floor` is the same model with everything frozen.
Peak memory is what a method alone would hold: its own weights, slices or adapters, optimizer and masks, and what a
step takes above that. Nothing is compiled here: bench_forms.py has that, on all layers of the model.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import steps
import systems
import torch
from harness import Comparison, Contender, Wrong
from shapes import DTYPE, GPU, SHORT_STEP, SMOKE, STEP, Load
from steps import FIELDS, FLOOR, LORA, OURS, contender
from systems import ATTENTION, MLP, System


def add_ours(comparison: Comparison, base: Any, batch: Any, load: Load) -> None:
    neurons = systems.random_neurons(load.model)

    def ours() -> Contender:
        system = systems.slices(base, batch, neurons)
        made = contender(system, steps.gradients_of(base, neurons))
        made.facts["note"] = f"gradients reach the optimizer in {steps.gradient_dtype(system)}"
        return made

    def fused_floor() -> Contender:
        return contender(systems.floor(base, batch, fuse=True))

    comparison.add(FLOOR, lambda: contender(systems.floor(base, batch)), "floor")
    comparison.add("floor with our frozen FFN", fused_floor, "floor")
    comparison.add(OURS, ours, "ours")


def add_adapters(comparison: Comparison, base: Any, batch: Any, load: Load) -> None:
    """LoRA twice where PEFT's cast of the adapters to fp32 means something: on a half-precision model."""
    start = steps.like(base)

    def make(*arguments: Any, **options: Any) -> Callable[[], Contender]:
        return lambda: contender(systems.lora(base, batch, *arguments, **options), start)

    for name, targets in ((LORA, ATTENTION + MLP), ("LoRA r=8 MLP", MLP)):
        comparison.add(name, make(targets))
        if torch.float32 != DTYPE:
            comparison.add(f"{name}, no fp32 cast", make(targets, fp32=False))
    comparison.add("DoRA r=8 all-linear", make(ATTENTION + MLP, dora=True), "peer")
    comparison.add("SHiRA on the FFN", lambda: contender(systems.shira(base, batch, load.model), start), "peer")
    if GPU:  # its kernels are for a GPU alone
        liger = functools.partial(steps.liger_lora, load)
        comparison.add(f"{LORA}, Liger", steps.in_its_own_process(liger), "peer")


def add_quantised(comparison: Comparison, base: Any, batch: Any, load: Load) -> None:
    """The same over a quantised base, and QLoRA. On a CPU there is no product to be measured: make smoke runs it."""
    if not (GPU or SMOKE):
        return
    neurons = systems.random_neurons(load.model)
    kinds = ("fp8", *(("nf4", "int8") if importlib.util.find_spec("bitsandbytes") else ()))
    for how in kinds:

        def ours(how: str = how) -> Contender:
            model = systems.quantised(base, how)
            made = contender(systems.slices(model, batch, neurons))
            made.facts["note"] = "its peak holds the unquantised base too, where the slices' values come from"
            return made

        comparison.add(f"slices 1 % over {how}", ours, "ours")
    if "nf4" in kinds:
        qlora = lambda: contender(systems.lora(systems.quantised(base, "nf4"), batch, ATTENTION + MLP))  # noqa: E731
        comparison.add(f"{LORA} over nf4 (QLoRA)", qlora, "peer")


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


def compare(benchmark: Any, load: Load, parts: tuple[Callable, ...], seconds: float) -> None:
    base, batch = systems.random_model(load.model), systems.batch_of(load)
    comparison = Comparison(benchmark, "step", str(load))
    for part in parts:
        part(comparison, base, batch, load)
    rows = comparison.measure(seconds)
    for name, row in rows.items():
        assert "error" in row or all(field in row for field in FIELDS), name


def test_step(benchmark):
    """Every method, in one setting."""
    compare(benchmark, STEP, (add_ours, add_quantised, add_adapters, add_heavy), 55 if not GPU else 15)


def test_short_step(benchmark):
    """Few tokens: what an optimizer over all weights costs counts for more."""
    compare(benchmark, SHORT_STEP, (add_ours, add_adapters, add_heavy), 20 if not GPU else 5)


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
        from slicetune.engine.common import distributed
        from slicetune.engine.training.config import TrainConfig
        from slicetune.engine.training.plan import Plan
        from slicetune.engine.training.zero import ZeroEngine

        distributed.start()
        system = systems.slices(base, batch, neurons)
        system.optimizer = None
        plan = Plan(load.sentences, load.sentences, 1, 1, 1)
        engine = ZeroEngine(system.model, TrainConfig(), 1, plan)
        return Contender(engine.step, lambda: engine.backward(_loss(engine, batch)))

    comparison.add("SparseColumnAdamW.step()", bare, "ours")
    comparison.add("DeepSpeed engine.step(), ZeRO 1, one rank", deepspeed)
    try:
        comparison.measure(15 if not GPU else 6)
    finally:
        from slicetune.engine.common import distributed

        distributed.stop()


def _update(system: System) -> None:
    system.optimizer.step()
    system.optimizer.zero_grad(set_to_none=True)


def _loss(model: Any, batch: Any) -> torch.Tensor:
    from slicetune.engine.scoring.loss import target_losses

    return target_losses(model, batch).mean()
