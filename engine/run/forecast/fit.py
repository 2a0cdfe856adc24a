"""The dry run's last table: settings with which all stages fit a GPU, best first.

Best is what is most exact, then what is fastest: full precision before int8 (weights rounded a row), fp8 (activations
too) and nf4 (4 bits); the whole model on each GPU before one cut up among them. A line has all flags that it takes.
What is left to the run (settle.py) is counted as the run would take it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import reduce

from ...methods.counts import Trainable
from ...models.shapes import ModelShape
from ..config import RunConfig
from . import memory
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
    "train.micro_batch_size",
    "evaluate.batch_size",
    "evaluate.on",
)
"""Settings that a line may name."""
EXPERIMENT = "an experiment, for Ada, Hopper and later GPUs"
"""What stands beside fp8: behind the flags, which are there to be copied."""
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
        note = [EXPERIMENT] if "fp8" in self.flags else []
        words = "; ".join(note + [stage.words for stage in self.settled.stages])
        sizes = ", ".join(f"{size / 1e9:.1f}" for size in self.sizes)
        return f"{self.flags or 'as set'}{f' ({words})' if words else ''}: {sizes} GB"


def table(load: Load) -> list[str]:
    """The ways that fit, at most one for each kind of weights; where none does, the leanest and what would help."""
    tried = list(ways(load))
    fitting = [way for way in tried if way.fits]
    stages = [word for word, there in zip(("scoring", "training"), _has(load), strict=True) if there]
    each = ", ".join([*stages, "decoding"])
    title = f"What fits in {load.world} × {load.gpu_memory / 1e9:.1f} GB ({USABLE:.0%} of it counted on), best first"
    if fitting:
        return [
            f"{title}: flags to add (how it then runs): GB while {each}",
            *(f"  {number}. {way}" for number, way in enumerate(fitting, 1)),
        ]
    least = min(tried, key=lambda way: (max(way.sizes), sum(way.sizes)))  # decoding in full precision is all kinds'
    return [f"{title}: nothing", f"  the leanest: {least}", f"  {_remedy(load)}"]


def ways(load: Load) -> Iterator[Way]:
    """Every kind of weights that the method allows, whole, and partitioned where there are several GPUs.

    Each with as few changes of the user's other settings as it takes to fit.
    """
    on, _ = partition(load.config, load.shape, load.world, load.gpu_memory)
    own = decided(load.config, on)
    no_fp8 = load.shape.packed or own.method.reads_weights
    kinds = [kind for kind in KINDS if kind != "fp8" or not no_fp8]
    for kind in ("none",) if own.method.trains_whole_weights else kinds:
        for cut in (False, True) if load.world > 1 and kind == "none" else (False,):
            changed = _changed(own, kind, cut)
            kept = _way(load, own, changed)
            yield kept if kept.fits else _way(load, own, _left_to_the_run(changed))


def _changed(config: RunConfig, kind: str, cut: bool) -> RunConfig:
    """The settings with these weights, and without those that they refuse: torch.compile, ZeRO stage 3."""
    quantised = kind != "none"
    compiled = "off" if cut or quantised else config.model.compile
    model = replace(config.model, quantize=kind, partition="on" if cut else "off", compile=compiled)
    zero = replace(config.zero, stage=2 if quantised and config.zero.stage == 3 else config.zero.stage)
    evaluate = replace(config.evaluate, on=config.evaluate.on if quantised else "auto")
    return replace(config, model=model, zero=zero, evaluate=evaluate)


def _left_to_the_run(config: RunConfig) -> RunConfig:
    """The same, with nothing set of what a run can settle."""
    model = replace(config.model, activation_checkpointing="auto")
    return replace(config, model=model, score=replace(config.score, tokens_per_batch="auto", counts="auto"))


def _way(load: Load, own: RunConfig, config: RunConfig) -> Way:
    """`config` with a smaller share of the training and a smaller batch of the decoding where they are too large."""

    def settled(one: RunConfig) -> Settled:
        return settle(one, load.shape, load.world, load.gpu_memory, load.counts)

    def decoded(one: RunConfig) -> int:
        return device_total(decoding(one, load.shape, load.world))

    def trains(one: RunConfig) -> int:
        training = settled(one).training
        return training.bytes if training else 0

    trained = _first(_trainings(config, load.world), trains, USABLE * load.gpu_memory)
    suited = _first(_decodings(trained), decoded, USABLE * load.gpu_memory)
    if load.config.model.partition == "auto" and config.model.quantize != "none":
        own = decided(own, False)  # which `auto` is then
    return Way(_flags(own, suited), settled(suited), decoded(suited), load.gpu_memory)


def _first(found: Iterable[RunConfig], size: Callable[[RunConfig], int], room: float) -> RunConfig:
    """The first that fits; of none that does the one that holds least."""
    tried = []
    for one in found:
        tried.append((size(one), one))
        if tried[-1][0] <= room:
            return one
    return min(tried, key=lambda pair: pair[0])[1]


def _trainings(config: RunConfig, world: int) -> Iterator[RunConfig]:
    """As set; with gradients divided among the GPUs; a sentence a forward, each way. First what costs least.

    Stage 2 keeps a bucket of 1 GB, so where little is trained stage 1 holds less. A routed model learns from other
    sentences when a forward has fewer: not the same training.
    """
    stages = [config]
    if config.zero.stage == 1 and world > 1 and config.model.partition == "off":
        stages.append(replace(config, zero=replace(config.zero, stage=2)))
    yield from stages
    if memory.micro_batch(config, world) > 1 and not config.method.routed:
        for one in stages:
            yield replace(one, train=replace(one.train, micro_batch_size=1))


def _decodings(config: RunConfig) -> Iterator[RunConfig]:
    sizes = [size for size in (8, 1) if size < config.evaluate.batch_size]
    for size in (config.evaluate.batch_size, *sizes):
        yield replace(config, evaluate=replace(config.evaluate, batch_size=size))


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
    beside = replace(load.config, evaluate=replace(load.config.evaluate, on="auto"))
    quantised = load.config.evaluate.on == "full" and any(way.fits for way in ways(replace(load, config=beside)))
    found = ["--evaluate.on quantised"] * quantised + ["a smaller --data.max-length"] * shorter
    found += ["more GPUs"] * more + ["larger GPUs"]
    return f"take {', or '.join(found)}"
