"""The dry run's last table: which stages fit a GPU with which settings, and the settings with which all of them do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ...methods.counts import Trainable
from ...models.shapes import ModelShape
from ..config import RunConfig
from . import memory
from .decoding import decoding
from .memory_report import CHECKPOINTING, USABLE, partition_flag, training_parts


@dataclass(frozen=True)
class Load:
    """What is to fit: a run of these settings on `world` GPUs of `gpu_memory` bytes."""

    config: RunConfig
    shape: ModelShape
    world: int
    counts: Trainable
    """What is trained."""
    micro: int
    """Sentences of a forward."""
    gpu_memory: int

    @property
    def settings(self) -> tuple[bool, int, bool]:
        """Whether the model is partitioned, the ZeRO stage, whether activations are checkpointed."""
        on, model = memory.partitioned(self.config), self.config.model
        return on, memory.zero_stage(self.config), model.activation_checkpointing

    def other(self, on: bool, stage: int, checkpointing: bool) -> Load:
        """The same with other settings, whose order is that of `settings`. torch.compile changes nothing here."""
        changed = {"partition": "on" if on else "off", "activation_checkpointing": checkpointing, "compile": "off"}
        zero, model = replace(self.config.zero, stage=stage), replace(self.config.model, **changed)
        return replace(self, config=replace(self.config, model=model, zero=zero))

    def scoring(self) -> int:
        """Bytes on a GPU, as of the two others."""
        return memory.device_total(memory.scoring(self.config, self.shape, self.world, self.gpu_memory))

    def training(self) -> int:
        """Stage 3 loads the whole model first, unless that is partitioned."""
        parts = training_parts(self.config, self.shape, self.world, self.counts, self.micro)
        return max(memory.device_total(parts), memory.loading(self.config, self.shape))

    def decoding(self) -> int:
        return memory.device_total(decoding(self.config, self.shape, self.world))

    def fits(self, size: int) -> bool:
        return size <= USABLE * self.gpu_memory

    def all_fit(self) -> bool:
        method = self.config.method
        sizes = [self.scoring] * method.scores + [self.training] * method.trains + [self.decoding]
        return all(self.fits(size()) for size in sizes)


def table(load: Load) -> list[str]:
    """Every stage without and with activation checkpointing, of the whole model and partitioned; what fits in all."""
    title = f"What fits in {load.world} × {load.gpu_memory / 1e9:.1f} GB ({USABLE:.0%} of it counted on)"
    rows = (row for on in ((False, True) if load.world > 1 else (False,)) for row in _rows(load, on))
    return [title, f"  {'':28}{'no checkpointing':>18}{'':14}{CHECKPOINTING}", *rows, f"  {_advice(load)}"]


def _rows(load: Load, on: bool) -> Iterator[str]:
    where = "partition on" if on else "partition off"
    if load.config.method.scores:
        yield _row(f"scoring, {where}", load, on, load.settings[1], Load.scoring)
    for stage in () if not load.config.method.trains else (3,) if on else (1, 2, 3):
        yield _row(f"training, {where if on else f'stage {stage}'}", load, on, stage, Load.training)
    yield _row(f"decoding, {where}", load, on, load.settings[1], Load.decoding)


def _row(name: str, load: Load, on: bool, stage: int, size: Callable[[Load], int]) -> str:
    cells = ""
    for checkpointing in (False, True):
        other = load.other(on, stage, checkpointing)
        own = other.settings == load.settings
        verdict = "fits" if load.fits(size(other)) else "too large"
        cells += f"{size(other) / 1e9:8.1f} GB {verdict:9} {'← as set' if own else '':10}"
    return f"  {name:24}{cells}".rstrip()


def _advice(load: Load) -> str:
    """Whether the run fits as set; else with which settings, the fewest changes first."""
    if load.all_fit():
        return "all stages fit as set"
    on, stage, checkpointing = load.settings
    cut = partition_flag(load.config)
    ways = {CHECKPOINTING: (on, stage, True), cut: (True, stage, checkpointing)}
    ways = {flag: way for flag, way in ways.items() if way != load.settings and (load.world > 1 or flag != cut)}
    ways |= {" ".join(ways): (load.world > 1, stage, True)} if len(ways) > 1 else {}
    if fitting := [flags for flags, way in ways.items() if load.other(*way).all_fit()]:
        return f"all stages fit with {fitting[0]}"
    return "not all stages fit with any of these: see each stage's remedy above, or take more GPUs, or larger ones"
