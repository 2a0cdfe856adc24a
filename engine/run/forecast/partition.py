"""What --model.partition auto is: on where one GPU does not hold what a stage of the run needs for the whole model.

Each stage counts with the leanest settings that are left to the run (settle.py), so activation checkpointing and
smaller batches come before a partition. Checkpointing costs a third of a forward and backward. A partitioned model
sends every weight to every rank twice a batch, 16 GB each time for an 8B: on cards that share no NVLink, which are the
small ones, this takes longer than a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ...models.shapes import ModelShape
from ..config import RunConfig
from .decoding import decoding
from .settle import settle
from .weights import USABLE, device_total


def partition(config: RunConfig, shape: ModelShape, world: int, gpu_memory: int | None) -> tuple[bool, str]:
    """Whether the model is partitioned over `world` ranks, and why, in a line.

    `gpu_memory` is a GPU's in bytes, all of it; None, where it is not known or there is no GPU, leaves `auto` at off.
    The answer follows from the settings and the GPU alone, not from what a run has chosen or what is free, so that it
    is the same in all of its stages and when it is started again.
    """
    if config.model.partition != "auto":
        return config.model.partition == "on", f"partition {config.model.partition}: as set"
    if world == 1:
        return False, "partition off: there is one rank"
    if config.model.quantize != "none":
        return False, f"partition off: --model.quantize {config.model.quantize} needs whole weights"
    if gpu_memory is None:
        return (
            False,
            "partition off: no GPU whose memory is known (or set --model.partition on)",
        )
    if config.model.compile == "blocks":
        return False, "partition off: --model.compile blocks needs whole weights"
    needs = dict(_stages(decided(config, False), shape, world, gpu_memory))
    name = max(needs, key=needs.__getitem__)
    size, gpu = f"{needs[name] / 1e9:.1f} GB", f"{gpu_memory / 1e9:.1f} GB"
    if needs[name] > USABLE * gpu_memory:
        more = f"more than {USABLE:.0%} of the GPU's {gpu}"
        return True, f"partition on: {name} with the whole model on each GPU takes {size}, {more}"
    return False, f"partition off: a GPU of {gpu} holds the whole model; {name} takes the most, {size}"


def decided(config: RunConfig, on: bool) -> RunConfig:
    """The settings with `auto` decided."""
    return replace(config, model=replace(config.model, partition="on" if on else "off"))


def _stages(config: RunConfig, shape: ModelShape, world: int, gpu_memory: int) -> Iterator[tuple[str, int]]:
    """(what is done with the model, bytes that a GPU then holds at least)."""
    found = settle(config, shape, world, gpu_memory)
    if found.scoring:
        yield "scoring", found.scoring.bytes
    if found.training:
        yield "training", found.training.bytes
    yield "decoding", device_total(decoding(config, shape, world))
