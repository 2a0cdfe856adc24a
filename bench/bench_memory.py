"""The 8B on a card of 24 GB: a step of 1 % slices, with and without activation checkpointing, and scoring.

    python bench/run.py gpu-record memory

The allocator is given 24 GB and no more; that it gets through is the result. In a smoke run a tiny model does the same.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import footprint
import pytest
import systems
import torch
from harness import Comparison, Contender
from shapes import DEVICE, GPU, SMALL_GPU_SCORE, SMALL_GPU_STEP, SMOKE, Load
from steps import OURS, contender

from slicetune.engine.scoring import passes as scoring
from slicetune.engine.scoring.config import ScoreConfig
from slicetune.engine.scoring.statistics import Statistics

pytestmark = pytest.mark.skipif(not GPU and not SMOKE, reason="the 8B needs a GPU")


@contextlib.contextmanager
def small_card(comparison: Comparison) -> Iterator[None]:
    """24 GB for the allocator, and all of the card again."""
    if GPU:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        total = torch.cuda.get_device_properties(DEVICE).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 24e9 / total))
    try:
        yield
    finally:
        comparison.live.clear()
        gc.collect()
        if GPU:
            torch.cuda.set_per_process_memory_fraction(1.0)


def reserved() -> int | None:
    return torch.cuda.max_memory_reserved() if GPU else None


@pytest.mark.parametrize("checkpointing", [True, False])
def test_training(benchmark, checkpointing):
    load = SMALL_GPU_STEP if checkpointing else Load(SMALL_GPU_STEP.model, 4, SMALL_GPU_STEP.length)
    how = "with" if checkpointing else "without"
    comparison = Comparison(benchmark, "24 GB", f"{load}, {how} activation checkpointing")

    def ours() -> Contender:
        base = systems.random_model(load.model)
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            base.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
            base.train()
        made = contender(systems.slices(base, systems.batch_of(load), systems.random_neurons(load.model)))
        made.facts["reserved_bytes"] = reserved()
        return made

    with small_card(comparison):
        comparison.add(f"{OURS}, train", ours, "ours")
        comparison.measure(5)


def test_scoring(benchmark):
    """Counts of four domains, all on the device."""
    load = SMALL_GPU_SCORE
    setting = f"{load.model.layers} layers, hidden {load.model.hidden}, sentences of {load.length} tokens"
    comparison = Comparison(benchmark, "24 GB", setting)

    def ours() -> Contender:
        model, examples = systems.random_model(load.model), systems.sentences(load)
        statistics = Statistics(["a", "b", "c", "d"], load.model, device=DEVICE)
        config = ScoreConfig(tokens_per_batch=512)
        held = footprint.resident(model, list(statistics.histogram.values()))

        def run() -> None:
            scoring.score(model, examples, statistics, config)

        facts = {"sentences": len(examples), "resident_bytes": held, "peak_bytes": held + footprint.peak(run)}
        facts["reserved_bytes"] = reserved()
        facts["note"] = "four domains' counts on the device, batches of 512 tokens"
        return Contender(run, facts=facts)

    with small_card(comparison):
        comparison.add("score", ours, "ours")
        comparison.measure(5)
