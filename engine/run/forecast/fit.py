"""The dry run's last table: settings with which all stages fit a GPU, best first.

Best is what is most exact, then what is fastest: full precision before int8 (weights rounded a row), fp8 (activations
too) and nf4 (4 bits); the whole model on each GPU before one cut up among them. A line has all flags that it takes.
What is left to the run (settle.py) is counted as the run would take it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce

from ...methods.counts import Trainable
from ...models.shapes import ModelShape
from ..config import RunConfig
from .decoding import decoding
from .partition import decided, partition
from .settle import Settled, settle
from .weights import USABLE, device_total

KINDS = ("none", "int8", "fp8", "nf4")
"""--model.quantize, the most exact first."""
FLAGS = (
    "model.quantize",
    "model.partition",
    "model.compile",
    "model.activation_checkpointing",
    "zero.stage",
    "score.tokens_per_batch",
    "score.counts",
    "evaluate.batch_size",
)
"""Settings that a line may name."""
SHORT, MANY = 64, 8
"""What is tried where nothing fits: tokens of a sample, times as many GPUs."""


@dataclass(frozen=True)
class Load:
    """What is to fit: a run of these settings on `world` GPUs of `gpu_memory` bytes."""

    config: RunConfig
    """As the user gave it; --model.partition may be `auto`."""
    shape: ModelShape
    world: int
    counts: Trainable
    """What is trained."""
    gpu_memory: int


@dataclass(frozen=True)
class Way:
    """Settings that are counted: their flags beside the user's own, and bytes of each stage."""

    flags: str
    settled: Settled
    decoding: int
    gpu_memory: int

    @property
    def sizes(self) -> list[int]:
        """Of scoring, training, as far as the run has them, and decoding."""
        return [stage.bytes for stage in self.settled.stages] + [self.decoding]

    @property
    def fits(self) -> bool:
        return max(self.sizes) <= USABLE * self.gpu_memory

    def __str__(self) -> str:
        words = "; ".join(stage.words for stage in self.settled.stages)
        sizes = ", ".join(f"{size / 1e9:.1f}" for size in self.sizes)
        note = ", for a Hopper GPU, an experiment" if "fp8" in self.flags else ""
        return f"{self.flags or 'as set'}{note}{f' ({words})' if words else ''}: {sizes} GB"


def table(load: Load) -> list[str]:
    """The ways that fit, at most one for each kind of weights; where none does, the leanest and what would help."""
    tried = list(ways(load))
    fitting = [way for way in tried if way.fits]
    stages = [word for word, there in zip(("scoring", "training"), _has(load), strict=True) if there]
    each = ", ".join([*stages, "decoding"])
    title = f"What fits in {load.world} × {load.gpu_memory / 1e9:.1f} GB ({USABLE:.0%} of it counted on), best first"
    if fitting:
        return [f"{title}, GB while {each}", *(f"  {number}. {way}" for number, way in enumerate(fitting, 1))]
    least = min(tried, key=lambda way: max(way.sizes))
    return [f"{title}: nothing", f"  the leanest: {least}", f"  {_remedy(load)}"]


def ways(load: Load) -> Iterator[Way]:
    """Every kind of weights that the method allows, whole, and partitioned where there are several GPUs.

    Of each the first variant that fits, else the last.
    """
    on, _ = partition(load.config, load.shape, load.world, load.gpu_memory)
    own = decided(load.config, on)
    for kind in ("none",) if own.method.trains_whole_weights else KINDS:
        for cut in (False, True) if load.world > 1 and kind == "none" else (False,):
            found: Way | None = None
            for one in _variants(_changed(own, kind, cut), load.world):
                found = _way(load, own, one)
                if found.fits:
                    break
            assert found is not None
            yield found


def _changed(config: RunConfig, kind: str, cut: bool) -> RunConfig:
    """The settings with these weights, and without those that they refuse: torch.compile, ZeRO stage 3."""
    model = replace(config.model, quantize=kind, partition="on" if cut else "off")
    if cut or kind != "none":
        model = replace(model, compile="off")
    stage = 2 if kind != "none" and config.zero.stage == 3 else config.zero.stage
    return replace(config, model=model, zero=replace(config.zero, stage=stage))


def _variants(config: RunConfig, world: int) -> Iterator[RunConfig]:
    """The same, with fewer settings of the user's own from one to the next: first those that cost least."""
    loose = replace(
        config,
        model=replace(config.model, activation_checkpointing="auto"),
        score=replace(config.score, tokens_per_batch="auto", counts="auto"),
    )
    divided = config.zero.stage == 1 and world > 1 and config.model.partition == "off"
    batches = [size for size in (8, 1) if size < config.evaluate.batch_size]
    for one in (config, loose) if loose != config else (config,):
        yield one
        for batch in batches:
            yield _decoded(one, batch)
        if divided:
            yield from (_decoded(_divided(one), batch) for batch in (config.evaluate.batch_size, *batches))


def _decoded(config: RunConfig, batch: int) -> RunConfig:
    return replace(config, evaluate=replace(config.evaluate, batch_size=batch))


def _divided(config: RunConfig) -> RunConfig:
    return replace(config, zero=replace(config.zero, stage=2))


def _way(load: Load, own: RunConfig, config: RunConfig) -> Way:
    settled = settle(config, load.shape, load.world, load.gpu_memory, load.counts)
    size = device_total(decoding(config, load.shape, load.world))
    return Way(_flags(own, config), settled, size, load.gpu_memory)


def _flags(own: RunConfig, other: RunConfig) -> str:
    """What to type beside the user's own flags."""
    found = []
    for name in FLAGS:
        before, after = (reduce(getattr, name.split("."), config) for config in (own, other))
        if before != after:
            found.append(f"--{name.replace('_', '-')} {after}")
    return " ".join(found)


def _has(load: Load) -> tuple[bool, bool]:
    return load.config.method.scores, load.config.method.trains


def _remedy(load: Load) -> str:
    """What would help where nothing fits; each is tried."""
    data = replace(load.config.data, max_length=min(SHORT, load.config.data.max_length))
    shorter = any(way.fits for way in ways(replace(load, config=replace(load.config, data=data))))
    more = any(way.fits for way in ways(replace(load, world=MANY * load.world)))
    found = ["a smaller --data.max-length"] * shorter + ["more GPUs"] * more + ["larger GPUs"]
    return f"take {', or '.join(found)}"
