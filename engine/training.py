"""The training loop: one visible step, under DeepSpeed ZeRO, resumable to the bit.

What is trained is whatever parameters of the model require a gradient (ffn.attach makes the chosen slices so). The
order of sentences is a function of (seed, epoch, step), the loss is normalised by the target tokens of the whole
update, so neither depends on the number of ranks or micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from . import distributed, signals
from .batching import Batch, Example, Order, PairOrder, pack, pad
from .compiled import compile_blocks
from .config import RunConfig
from .diary import Diary
from .guard import FiniteWatch
from .landermt.routed import Router
from .landermt.routing import router_of
from .loss import target_losses, token_weights
from .metrics import Metrics
from .models import packs_long_rows, takes_position_ids
from .plan import Plan, learning_rate, order_of
from .saves import Saves
from .zero import ZeroEngine, load_masters


class Batcher:
    """Examples to batches on this rank's device, packed or padded; the router of a routed model is told of each."""

    def __init__(self, packed: bool, pad_id: int, router: Router | None = None) -> None:
        self.packed, self.pad_id, self.router = packed, pad_id, router
        self.device = distributed.device()

    def __call__(self, examples: Sequence[Example], weights: Sequence[float] | None = None) -> Batch:
        batch = (pack(examples, weights) if self.packed else pad(examples, self.pad_id, weights)).to(self.device)
        if self.router:
            self.router.read(batch)
        return batch

    def filled(self, examples: Sequence[Example], filler: Example) -> Batch:
        """A rank without a sentence runs `filler` with weight 0: every rank takes part in every collective."""
        return self(examples) if examples else self([filler], [0.0])


@dataclass(frozen=True)
class Update:
    """What happened in one update of the weights."""

    step: int
    """Its number, from 0."""
    epoch: int
    rate: float
    sentences: list[Example]
    loss: float
    """This rank's part of the mean cross-entropy of the update's target tokens, in nats."""
    finite: bool
    """Loss and gradients were, on every rank."""
    applied: bool
    """The weights moved."""


class Updater:
    """Forward, backward and optimizer of one update after the other."""

    def __init__(
        self, engine: ZeroEngine, config: RunConfig, plan: Plan, order: Order | PairOrder, batcher: Batcher
    ) -> None:
        self.engine, self.config, self.plan, self.order, self.batcher = engine, config, plan, order, batcher
        self.watch = FiniteWatch(engine.params.values(), config.train.non_finite == "skip")

    def __call__(self, step: int, examples: Sequence[Example]) -> Update:
        """Update number `step`, from 0 (a collective). Raises UserError as `train` does."""
        engine, plan, router = self.engine, self.plan, self.batcher.router
        rank, world = distributed.rank(), distributed.world()
        epoch, within = divmod(step, plan.updates_per_epoch)
        sentences = [examples[i] for i in self.order.update(epoch, within)]
        tokens = sum(len(example.input_ids) - example.target_start for example in sentences)
        rate = learning_rate(self.config.train, step, plan.steps)
        engine.begin_update(rate, router.names(example.group for example in sentences) if router else None)
        total, finite, applied = 0.0, True, False
        for indices in self.order.share(epoch, within, rank, world, plan.accumulation):
            batch = self.batcher.filled([examples[i] for i in indices], sentences[0])
            loss = (target_losses(engine, batch) * token_weights(batch)).sum() / tokens
            engine.backward(loss * (world * plan.accumulation))  # DeepSpeed averages over both
            value = self.watch.check(loss, batch, step)
            total, finite = total + (value or 0.0), finite and value is not None
            applied = engine.step(discard=not finite)
        return Update(step, epoch, rate, sentences, total, finite, applied)


def train(
    model: nn.Module,
    config: RunConfig,
    examples: Sequence[Example],
    dev: Sequence[Example],
    out: Path,
    *,
    pad_id: int,
    identity: dict[str, Any],
) -> Path:
    """Train the parameters of `model` that require a gradient; returns the checkpoint folder to export.

    `identity` names what a checkpoint belongs to (model, neurons, data, settings): a resume with another one is
    refused. Raises UserError on a loss or gradient that is not finite on any rank, before any weight changes (or skips
    that update: `non_finite`), and Interrupted, with the step saved, after a signal to any rank.
    """
    router = router_of(model)
    order = order_of(config, examples, router)
    plan = Plan.of(config.train, len(examples), distributed.world(), order.updates_per_epoch)
    distributed.print0(f"training: {plan}")
    saves = Saves(out / "checkpoints", config, identity)
    tensors, state = saves.resume(model)
    if state.step >= plan.steps:
        distributed.print0(f"training: already complete at step {state.step}")
        return saves.exported(state)
    if tensors:
        load_masters(model, tensors)
    model.train()
    engine = ZeroEngine(model, config, plan.micro_batch, plan.accumulation)
    if config.model.compile == "blocks":
        distributed.print0(f"training: {compile_blocks(model)} blocks compiled at their first use")
    if tensors:
        engine.load_state(tensors, state.group_steps)
    update = Updater(engine, config, plan, order, Batcher(takes_position_ids(model), pad_id, router))
    metrics = Metrics(out, config, plan.steps, state.step, model)
    reader = Batcher(packs_long_rows(model), pad_id, router)
    diary = Diary(engine, config, plan, saves, state, metrics, dev, reader)
    diary.catch_up()
    for step in range(state.step, plan.steps):
        if diary.enter(update(step, examples)):
            raise signals.interrupted(f"training, at step {state.step} of {plan.steps}, which is saved")
    update.watch.close()
    diary.close()
    engine.close()
    return saves.exported(state)
