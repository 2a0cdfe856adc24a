"""The training loop: one visible step, under DeepSpeed ZeRO, resumable to the bit.

What is trained is whatever parameters of the model require a gradient (ffn.attach makes the chosen slices so). The
order of sentences is a function of (seed, epoch, step), the loss is normalised by the target tokens of the whole
update, so neither depends on the number of ranks or micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..common import distributed, signals
from ..data.batching import Example
from ..methods.landermt.routing import router_of
from ..models.packing import packs_long_rows, takes_position_ids
from ..slices.patches import load_masters
from .compiled import compile_blocks
from .config import TrainConfig
from .diary import Diary
from .metrics import Metrics
from .order import order_of
from .plan import Plan
from .saves import Saves
from .updates import Batcher, Updater
from .zero import ZeroEngine


@dataclass(frozen=True)
class Setup:
    """What a training depends on beside --train.*."""

    pad_id: int
    stage: int = 1
    """ZeRO's."""
    seed: int = 0
    resume: str = "auto"
    compiled: bool = False
    """Compile the decoder blocks."""
    dev_tokens: int = 4096
    """Of a batch of the dev loss."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The run's, for the trackers that show them."""


def train(
    model: nn.Module,
    config: TrainConfig,
    setup: Setup,
    examples: Sequence[Example],
    dev: Sequence[Example],
    out: Path,
    identity: dict[str, Any],
) -> Path:
    """Train the parameters of `model` that require a gradient; returns the checkpoint folder to export.

    `identity` names what a checkpoint belongs to (model, neurons, data, settings): a resume with another one is
    refused. Raises UserError on a loss or gradient that is not finite on any rank, before any weight changes (or skips
    that update: `non_finite`), and Interrupted, with the step saved, after a signal to any rank.
    """
    router = router_of(model)
    order = order_of(config, setup.seed, examples, router)
    plan = Plan.of(config, len(examples), distributed.world(), order.updates_per_epoch)
    distributed.print0(f"training: {plan}")
    saves = Saves(out / "checkpoints", config, setup.resume, identity)
    tensors, state = saves.resume(model)
    if state.step >= plan.steps:
        distributed.print0(f"training: already complete at step {state.step}")
        return saves.exported(state)
    if tensors:
        load_masters(model, tensors)
    model.train()
    engine = ZeroEngine(model, config, setup.stage, plan)
    if setup.compiled:
        distributed.print0(f"training: {compile_blocks(model)} blocks compiled at their first use")
    if tensors:
        engine.load_state(tensors, state.group_steps)
    update = Updater(engine, config, plan, order, Batcher(takes_position_ids(model), setup.pad_id, router))
    metrics = Metrics(out, config, setup.settings, plan.steps, state.step, model)
    reader = Batcher(packs_long_rows(model), setup.pad_id, router)
    diary = Diary(engine, config, plan, saves, state, metrics, dev, reader, setup.dev_tokens)
    diary.catch_up()
    for step in range(state.step, plan.steps):
        if diary.enter(update(step, examples)):
            raise signals.interrupted(f"training, at step {state.step} of {plan.steps}, which is saved")
    update.watch.close()
    diary.close()
    engine.close()
    return saves.exported(state)
