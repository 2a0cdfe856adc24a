"""One update: its micro-batches forward and backward, their losses, the optimizer's step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..common import distributed
from ..data.batching import Batch, Example, pack, pad
from ..methods.landermt.routed import Router
from ..scoring.loss import target_losses, token_weights
from .config import TrainConfig
from .guard import FiniteWatch
from .order import Order, PairOrder
from .plan import Plan, learning_rate
from .zero import ZeroEngine


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
        self, engine: ZeroEngine, train: TrainConfig, plan: Plan, order: Order | PairOrder, batcher: Batcher
    ) -> None:
        self.engine, self.train, self.plan, self.order, self.batcher = engine, train, plan, order, batcher
        self.watch = FiniteWatch(engine.params.values(), train.non_finite == "skip")

    def __call__(self, step: int, examples: Sequence[Example]) -> Update:
        """Update number `step`, from 0 (a collective). Raises UserError as `train` does."""
        engine, plan, router = self.engine, self.plan, self.batcher.router
        rank, world = distributed.rank(), distributed.world()
        epoch, within = divmod(step, plan.updates_per_epoch)
        sentences = [examples[i] for i in self.order.update(epoch, within)]
        tokens = sum(len(example.input_ids) - example.target_start for example in sentences)
        rate = learning_rate(self.train, step, plan.steps)
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
