"""What is kept of training between updates: metrics, dev loss, warnings, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..common import distributed, signals
from ..data.batching import Example, batches_by_tokens
from ..scoring.loss import target_losses, token_weights
from .config import TrainConfig
from .guard import SpikeWatch, check_skipped, warn_of_spike
from .metrics import Metrics
from .plan import Plan
from .saves import Saves, State
from .updates import Batcher, Update
from .zero import ZeroEngine


class Diary:
    """Reads each update and writes what is due after it; `state` is kept up to date."""

    def __init__(
        self,
        engine: ZeroEngine,
        train: TrainConfig,
        plan: Plan,
        saves: Saves,
        state: State,
        metrics: Metrics,
        dev: Sequence[Example],
        batcher: Batcher,
        dev_tokens: int,
    ) -> None:
        self.engine, self.train, self.plan, self.saves, self.state = engine, train, plan, saves, state
        self.metrics, self.dev, self.batcher, self.dev_tokens = metrics, dev, batcher, dev_tokens
        self.spikes = SpikeWatch()
        self.eval_every = train.eval_steps or plan.updates_per_epoch
        self.save_every = train.save_steps or plan.updates_per_epoch

    def catch_up(self) -> None:
        """Measure the dev loss that a stop left out."""
        state = self.state
        if state.step and state.step % self.eval_every == 0 and state.dev_step != state.step:
            self._evaluate()

    def enter(self, update: Update) -> bool:
        """Take an update (a collective); whether a signal asks to stop: the step is saved then.

        Raises UserError on a loss that jumped, where that is to stop training, and on too many skipped updates.
        """
        done = self.state.step = update.step + 1
        loss, signalled = distributed.sums(update.loss, float(signals.requested()))
        stopping = bool(signalled) and done < self.plan.steps
        self._report(update, loss)
        last = done == self.plan.steps
        if (done % self.eval_every == 0 or last) and not stopping:  # evaluation can take longer than 30 s
            self._evaluate()
        if done % self.save_every == 0 or last or self.state.best_step == done or stopping:
            self.saves.save(self.engine, self.state)
        if stopping:
            self.close()
        return stopping

    def close(self) -> None:
        self.metrics.close()

    def _report(self, update: Update, loss: float) -> None:
        done, state = update.step + 1, self.state
        if not update.applied:
            state.skipped = [*state.skipped, done]
            check_skipped(state.skipped)
        read = sum(len(example.input_ids) for example in update.sentences)
        shown = loss if update.finite else None
        self.metrics.step(done, update.epoch, shown, self.engine, read, len(state.skipped))
        if update.applied:
            uids, stop = [example.uid for example in update.sentences], self.train.loss_spike == "stop"
            warn_of_spike(self.spikes, loss, done, update.rate, uids, stop)
        elif update.finite:
            distributed.print0(f"warning: step {done}: DeepSpeed skipped the update: its summed gradient overflowed")

    def _evaluate(self) -> None:
        if not self.dev:
            return
        state = self.state
        loss = dev_loss(self.engine, self.batcher, self.dev, self.dev_tokens)
        state.dev_step = state.step
        if loss < state.best_dev_loss:
            state.best_dev_loss, state.best_step = loss, state.step
        self.metrics.dev(state.step, loss)


def dev_loss(
    model: Callable[..., Any], batcher: Batcher, dev: Sequence[Example], tokens_per_batch: int = 4096
) -> float:
    """Mean cross-entropy of the target tokens of `dev`, in nats a token, over all ranks (a collective)."""
    rank, world = distributed.rank(), distributed.world()
    batches = list(batches_by_tokens(dev, tokens_per_batch, batcher.packed))
    total = count = 0.0
    with torch.no_grad():
        for turn in range(0, len(batches), world):  # every rank runs as many forwards: ZeRO-3 gathers in each
            mine = batches[turn + rank] if turn + rank < len(batches) else []
            batch = batcher.filled([dev[i] for i in mine], dev[0])
            weights = token_weights(batch)
            total += float((target_losses(model, batch) * weights).sum(dtype=torch.float64))
            count += float(weights.sum())
    return distributed.agree(total, "sum") / distributed.agree(count, "sum")
