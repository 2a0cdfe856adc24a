"""What --model.partition auto is: on where one GPU does not hold what a stage of the run needs for the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ...models.shapes import ModelShape
from ...training.plan import Plan
from ..config import RunConfig
from . import memory, memory_report
from .decoding import decoding


def partition(config: RunConfig, shape: ModelShape, world: int, gpu_memory: int | None) -> tuple[bool, str]:
    """Whether the model is partitioned over `world` ranks, and why, in a line.

    `gpu_memory` is a GPU's in bytes; None, where it is not known or there is no GPU, leaves `auto` at off. The answer
    follows from the settings alone, not from what a run has chosen, so that it is the same in all of its stages.
    """
    if config.model.partition != "auto":
        return config.model.partition == "on", f"partition {config.model.partition}: as set"
    if world == 1:
        return False, "partition off: there is one rank"
    if gpu_memory is None:
        return (
            False,
            "partition off: no GPU whose memory is known (or set --model.partition on)",
        )
    if config.model.compile == "blocks":
        return False, "partition off: --model.compile blocks needs whole weights"
    needs = {
        name: memory.device_total(parts) for name, parts in _stages(decided(config, False), shape, world, gpu_memory)
    }
    name = max(needs, key=needs.__getitem__)
    size, gpu = f"{needs[name] / 1e9:.1f} GB", f"{gpu_memory / 1e9:.1f} GB"
    if needs[name] > memory_report.USABLE * gpu_memory:
        more = f"more than {memory_report.USABLE:.0%} of the GPU's {gpu}"
        return True, f"partition on: {name} with the whole model on each GPU takes {size}, {more}"
    return False, f"partition off: a GPU of {gpu} holds the whole model; {name} takes the most, {size}"


def decided(config: RunConfig, on: bool) -> RunConfig:
    """The settings with `auto` decided."""
    return replace(config, model=replace(config.model, partition="on" if on else "off"))


def _stages(
    config: RunConfig, shape: ModelShape, world: int, gpu_memory: int
) -> Iterator[tuple[str, list[memory.Part]]]:
    """(what is done with the model, what a GPU then holds)."""
    if config.method.scores:
        yield "scoring", memory.scoring(config, shape, world, gpu_memory)
    if config.method.trains:
        micro = Plan.of(config.train, 1, world).micro_batch
        yield "training", memory_report.training_parts(config, shape, world, config.method.bounds(shape), micro)
    yield "decoding", decoding(config, shape, world)
