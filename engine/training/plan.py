"""What a training run will do: how many updates, which sentences in which, at which learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .config import TrainConfig


@dataclass(frozen=True)
class Plan:
    """How many steps, and how an update's sentences are split: derived from the settings, printed at the start."""

    sentences: int
    micro_batch: int
    accumulation: int
    updates_per_epoch: int
    steps: int

    @staticmethod
    def of(train: TrainConfig, sentences: int, world: int, updates_per_epoch: int = 0) -> Plan:
        """`updates_per_epoch` where the order of sentences says it: micro-batches of one pair fill updates less."""
        micro = train.micro_batch_size or math.ceil(train.global_batch_size / world)
        accumulation = math.ceil(train.global_batch_size / (micro * world))
        updates = updates_per_epoch or math.ceil(sentences / train.global_batch_size)
        steps = updates * train.epochs
        return Plan(sentences, micro, accumulation, updates, min(steps, train.max_steps or steps))

    def __str__(self) -> str:
        return (
            f"{self.sentences} sentences, {self.updates_per_epoch} updates an epoch, {self.steps} in all; an update is "
            f"{self.accumulation} micro-batch(es) of up to {self.micro_batch} sentences on each rank"
        )


def learning_rate(train: TrainConfig, step: int, steps: int) -> float:
    """Rate of update `step` (0 is the first) out of `steps`: linear warm-up, then the named schedule."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(1, steps - train.warmup_steps)
    if train.lr_scheduler == "linear":
        return train.learning_rate * (1 - progress)
    if train.lr_scheduler == "cosine":
        return train.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    return train.learning_rate
