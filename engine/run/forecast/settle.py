"""What the settings that are left to the run turn out to be: the fastest that fit a GPU, for scoring and for training.

Tokens of a scoring batch, activation checkpointing and where the histogram counts live change speed and memory, not
results, so a run takes them by what the arithmetic of memory.py says of the GPU that is there. Each stage loads the
model by itself and has settings of its own. What a user sets is kept. Next: partition.py, which comes first in a run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ...common import distributed
from ...data.config import DataConfig
from ...methods.counts import Trainable
from ...models.config import ModelConfig
from ...models.shapes import ModelShape
from ...scoring.config import USUAL_TOKENS, ScoreConfig
from ..config import RunConfig
from . import memory
from .weights import USABLE, device_total, partitioned

TOKENS = (USUAL_TOKENS, 2048, 1024, 512, 256)
"""Tokens of a batch that are tried."""
FULL = 1024
"""Tokens that fill a GPU: with fewer its time goes into reading weights, and half as many take as long. A partitioned
model is sent to every rank for each batch, which takes about as long as 4,096 tokens."""
RECOMPUTING = 4 / 3
"""Times as long with activation checkpointing: a third forward beside a forward and a backward of two."""
COPYING = 1.1
"""Times as long with counts on the host: a copy of a batch's bins, and their sums by the CPU. An estimate."""


@dataclass(frozen=True)
class Stage:
    """One stage's settings, without `auto`, and what it then holds of a GPU."""

    words: str
    """The settings, as a line of a run and of the dry run has them."""
    config: RunConfig
    bytes: int
    """0 where no GPU is known."""
    fits: bool

    def __str__(self) -> str:
        size = f"{self.bytes / 1e9:.1f} GB"
        return f"{self.words} ({size}{'' if self.fits else ': too large, and nothing here takes less'})"


@dataclass(frozen=True)
class Settled:
    """A run's settings for each stage; None where the run has no such stage."""

    scoring: Stage | None
    training: Stage | None

    @property
    def stages(self) -> list[Stage]:
        """Those that the run has, in its order."""
        return [stage for stage in (self.scoring, self.training) if stage]

    def __str__(self) -> str:
        return "; ".join(map(str, self.stages))


def settle(
    config: RunConfig, shape: ModelShape, world: int, room: int | None, counts: Trainable | None = None
) -> Settled:
    """The fastest settings with which each stage fits in 95 % of `room`, bytes of one GPU; else the leanest.

    --model.partition is decided before. `room` None is a run without a GPU, which takes what it always took: 4,096
    tokens, no checkpointing, counts on the device. `counts` is what is trained (None: what the method expects).
    """
    method = config.method

    def scoring(one: RunConfig) -> int:
        return device_total(memory.scoring(one, shape, world))

    def training(one: RunConfig) -> int:
        own = counts or method.bounds(shape)
        held = (parts(one, shape, world, own) for parts in (memory.trained, memory.dev_loss))
        return max(memory.loading(one, shape), *map(device_total, held))

    return Settled(
        _first(scoring_ways(config), scoring, room, _scoring_words) if method.scores else None,
        _first(training_ways(config), training, room, _training_words) if method.trains else None,
    )


def scoring_ways(config: RunConfig) -> list[RunConfig]:
    """The settings that scoring can have, fastest first; of two that are as fast the one with larger batches.

    For a Llama: the device's counts with 4,096, 2,048 and 1,024 tokens; the same with counts on the host; both with
    checkpointing; then batches that no longer fill a GPU. Of a partitioned one checkpointing comes before any smaller
    batch. A batch smaller than --data.max-length would save nothing.
    """
    score = config.score
    sizes = [n for n in TOKENS if n >= config.data.max_length] or TOKENS[:1]
    tokens = sizes if score.tokens_per_batch == "auto" else [score.tokens_per_batch]
    places = ["device"] if config.method.routes else ["device", "host"]  # a detection's sums are on the host anyway
    places = places if score.counts == "auto" else [score.counts]
    ways = [
        (_time(config, size, how, where), -size, _with(config, size, how, where))
        for how in _checkpointing(config)
        for where in places
        for size in tokens
    ]
    return [way for *_, way in sorted(ways, key=lambda way: way[:2])]


def training_ways(config: RunConfig) -> list[RunConfig]:
    """The settings that training can have, fastest first: its batch is a user's, that of the dev loss is not."""
    tokens = TOKENS if config.score.tokens_per_batch == "auto" else [config.score.tokens_per_batch]
    places = "device" if config.score.counts == "auto" else config.score.counts
    return [_with(config, size, how, places) for how in _checkpointing(config) for size in tokens]


def _time(config: RunConfig, tokens: int, checkpointing: str, counts: str) -> float:
    """How long a way of scoring takes, against the fastest."""
    recomputing, copying = checkpointing == "on", counts == "host"
    full = USUAL_TOKENS if partitioned(config) else FULL
    return max(1.0, full / tokens) * (RECOMPUTING if recomputing else 1) * (COPYING if copying else 1)


def _checkpointing(config: RunConfig) -> Sequence[str]:
    chosen = config.model.activation_checkpointing
    return ("off", "on") if chosen == "auto" else (chosen,)


def _with(config: RunConfig, tokens: int, checkpointing: str, counts: str) -> RunConfig:
    model = replace(config.model, activation_checkpointing=checkpointing)
    return replace(config, model=model, score=replace(config.score, tokens_per_batch=tokens, counts=counts))


def _scoring_words(config: RunConfig) -> str:
    where = "" if config.method.routes else f", counts on the {config.score.counts}"
    return f"scoring {config.score.batch_tokens:,} tokens a batch, {_checkpointed(config)}{where}"


def _training_words(config: RunConfig) -> str:
    return f"training {_checkpointed(config)}"


def _checkpointed(config: RunConfig) -> str:
    return "checkpointing" if config.model.checkpoints else "no checkpointing"


def _first(
    ways: Sequence[RunConfig],
    size: Callable[[RunConfig], int],
    room: int | None,
    words: Callable[[RunConfig], str],
) -> Stage:
    """The first way that fits; of none that does the one that holds least."""
    if room is None:
        return Stage(words(ways[0]), ways[0], 0, True)
    sizes = []
    for way in ways:
        sizes.append(size(way))
        if sizes[-1] <= USABLE * room:
            return Stage(words(way), way, sizes[-1], True)
    least = min(range(len(ways)), key=sizes.__getitem__)
    return Stage(words(ways[least]), ways[least], sizes[least], False)


def for_scoring(
    model: ModelConfig, score: ScoreConfig, shape: ModelShape, groups: int, max_length: int
) -> tuple[ModelConfig, ScoreConfig]:
    """What `slicetune score` takes, which is no run; printed where there is a GPU. Every rank calls it.

    --model.partition is decided before; `groups` is how many the statistics have, `max_length` a sample's tokens.
    """
    data = DataConfig(seen=tuple(map(str, range(groups))), unseen=(), max_length=max_length)
    config = RunConfig(model=replace(model, compile="off"), score=score, data=data)
    _, room = distributed.gpu_memory()
    settled = settle(config, shape, distributed.world(), room)
    assert settled.scoring is not None
    if room:
        distributed.print0(line(replace(settled, training=None), room))
    return settled.scoring.config.model, settled.scoring.config.score


def line(settled: Settled, room: int) -> str:
    """What a run takes, and why."""
    return f"the fastest settings that fit {USABLE:.0%} of the {room / 1e9:.1f} GB free on a GPU: {settled}"
