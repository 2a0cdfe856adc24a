"""A step of the whole model on the engine's own batches: ours, LoRA and the frozen floor, as they are and compiled.

    python bench/run.py cpu bench_forms.py

Batches are packed as `train` packs them, padded with unequal lengths, or of equal lengths, of 480 and of 8,192 tokens.
Compiled is block by block, for all three in the same way, and all take the engine's loss. The compiled floor is the
plain model's: it owes nothing to our kernels.

On a CPU all is of 480 tokens, and only packed rows are compiled: each system costs it half a minute of the compiler.
Equal lengths are in bench_step.py's table there.
"""

from __future__ import annotations

import functools
from typing import Any

import checks
import pytest
import systems
from harness import Comparison
from shapes import GPU, SMOKE, WHOLE_SHORT_STEP, WHOLE_STEP, Load
from steps import FIELDS, FLOOR, LORA, OURS, Make, contender, gradients_of, like
from systems import ATTENTION, MLP, System
from torch import nn

SIZES = {"short": WHOLE_SHORT_STEP, "long": WHOLE_STEP}
FULL_GRADIENTS = 1000
"""Tokens up to which whole weight gradients of all layers fit beside the activations: ours are held against them."""


@functools.cache
def model(shape: Any) -> nn.Module:
    """One for all tests of a process: on the 8B's scale it takes seconds to draw."""
    return systems.random_model(shape)


def makes(base: nn.Module, load: Load) -> dict[str, tuple[Make, str]]:
    """By name: what makes the contender, and its kind."""
    batch, neurons = systems.batch_of(load), systems.random_neurons(load.model)
    start = like(base)
    ours_checks = (start, gradients_of(base, neurons)) if load.tokens <= FULL_GRADIENTS else (start,)
    found: dict[str, tuple[Make, str]] = {}

    def add(name: str, kind: str, make: Any, *more: Any) -> None:
        def compiled() -> System:
            return systems.compiled(make())

        found[name] = (lambda: contender(make(), *more), kind)
        found[f"{name}, compiled"] = (lambda: contender(compiled(), checks.is_compiled, *more), kind)

    # What the goals are about comes first: where the time runs out, the rest says that it was left out.
    add(FLOOR, "floor", lambda: systems.floor(base, batch), start)
    add(OURS, "ours", lambda: systems.slices(base, batch, neurons), *ours_checks)
    # Adapters of the model's own dtype: the faster form of LoRA, which fits with 8,192 tokens of all layers.
    add(LORA, "rival", lambda: systems.lora(base, batch, ATTENTION + MLP, fp32=not GPU), start)
    return dict(sorted(found.items(), key=lambda item: item[0] != FLOOR and "compiled" not in item[0]))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", ["packed", "padded", "equal"])
def test_step(benchmark, form, size):
    if not GPU and not SMOKE and (size == "long" or form == "equal"):
        pytest.skip("a CPU has the other ones")
    load = Load(SIZES[size].model, SIZES[size].sentences, SIZES[size].length, form)
    comparison = Comparison(benchmark, "whole step", str(load))
    for name, (make, kind) in makes(model(load.model), load).items():
        if GPU or form == "packed" or "compiled" not in name:
            comparison.add(name, make, kind, form=form, tokens=load.tokens)
    rows = comparison.measure(20 if not GPU else 4 if size == "short" else 10)
    for name, row in rows.items():
        assert "error" in row or all(field in row for field in FIELDS), name
