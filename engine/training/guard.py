"""What watches training: losses and gradients that are not finite, on any rank, and losses that jump."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common import distributed, private
from ..common.errors import UserError
from ..data.batching import Batch

MOST_HELD = 64 << 20
"""Bytes of gradients that a FiniteWatch holds at most before it reduces them."""


class FiniteWatch:
    """Looks at this rank's own gradients in the backward pass, before DeepSpeed adds the ranks' up.

    DeepSpeed looks at the sum alone, and skips an update without a word. Gradients are held until they are many, or
    all are there, and reduced in one operation: a NaN or an infinity anywhere makes its norm not finite. `skip`: say so
    and go on, rather than stop.
    """

    def __init__(self, params: Iterable[nn.Parameter], skip: bool = False) -> None:
        self.held: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.bytes = self.seen = 0
        self.skip = skip
        self.handles = [p.register_hook(self._see) for p in params]

    def _see(self, gradient: Tensor) -> None:
        self.held.append(gradient.detach())
        self.bytes += gradient.nbytes
        self.seen += 1
        # The last one: DeepSpeed reduces over the ranks, in place, when the backward ends.
        if self.bytes > MOST_HELD or self.seen == len(self.handles):
            self._reduce()

    def _reduce(self) -> None:
        if self.held:
            # The largest absolute value, not a sum of squares, which overflows in fp16.
            self.norms += private.largest_values(self.held)
        self.held, self.bytes = [], 0

    def check(self, loss: Tensor, batch: Batch, step: int) -> float | None:
        """The loss of a micro-batch as a number; call it between backward and step (a collective).

        Waits for the device once. If loss or gradient is not finite on any rank, every rank raises UserError with the
        same words, or, to skip, gets None.
        """
        self._reduce()
        largest = [torch.stack([norm.float() for norm in self.norms]).max()] if self.norms else []
        own = torch.stack([loss.detach().float(), *largest])
        self.norms, self.seen = [], 0
        value, *gradients, somewhere = torch.cat(
            [own, distributed.largest((~own.isfinite()).any().float())[None]]
        ).tolist()
        wrong = "loss" if not math.isfinite(value) else "gradient" if not all(map(math.isfinite, gradients)) else ""
        if somewhere:
            found = [(rank, *one) for rank, one in enumerate(distributed.collect((wrong, batch.uids))) if one[0]]
            where = "; ".join(f"{what} of rank {rank}, sentences {_few(uids)}" for rank, what, uids in found)
            line = f"step {step + 1}: not finite: {where}; no weight or optimizer state was changed"
            if not self.skip:
                remedy = "lower --train.learning-rate, look at those sentences, or go on by --train.non-finite skip"
                raise UserError(f"{line}: {remedy}", agreed=True)
            distributed.print0(f"warning: {line}: the update is skipped")
            return None
        return value

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


MOST_SKIPPED = 10
"""Updates in a row that may be skipped: more are no accident of the data."""


def check_skipped(skipped: Sequence[int]) -> None:
    """Raises UserError if the last updates of `skipped`, ascending numbers of updates, were skipped in a row."""
    if len(skipped) >= MOST_SKIPPED and skipped[-1] - skipped[-MOST_SKIPPED] == MOST_SKIPPED - 1:
        last = f"steps {skipped[-MOST_SKIPPED]} to {skipped[-1]}"
        raise UserError(f"{last} were all skipped: not finite: lower --train.learning-rate, then resume", agreed=True)


class SpikeWatch:
    """A loss far above its running mean: by more than `deviations` running deviations, and by half of it or more."""

    def __init__(self, warmup: int = 10, deviations: float = 6.0, memory: float = 0.95) -> None:
        self.warmup, self.deviations, self.memory = warmup, deviations, memory
        self.seen, self.mean, self.variance = 0, 0.0, 0.0

    def see(self, loss: float) -> bool:
        """Take the next update's loss; whether it is a spike. A spike does not move the mean."""
        apart = loss - self.mean
        if self.seen >= self.warmup and apart > max(self.deviations * math.sqrt(self.variance), 0.5 * abs(self.mean)):
            return True
        self.seen += 1
        keep = min(self.memory, 1 - 1 / self.seen)
        self.mean += (1 - keep) * apart
        self.variance = keep * (self.variance + (1 - keep) * apart**2)
        return False


def warn_of_spike(watch: SpikeWatch, loss: float, step: int, rate: float, uids: Sequence[str], stop: bool) -> None:
    """Say that the loss of update `step` jumped; raise UserError if training is to stop at it."""
    mean = watch.mean
    if not watch.see(loss):
        return
    line = f"step {step}: loss {loss:.3f} after a mean of {mean:.3f}, learning rate {rate:g}, sentences {_few(uids)}"
    if stop:
        raise UserError(f"{line}: stopped by --train.loss-spike stop; lower the rate, then resume", agreed=True)
    distributed.print0(f"warning: {line}")


def _few(uids: Sequence[Any], most: int = 8) -> str:
    return " ".join(map(str, uids[:most])) + (f" and {len(uids) - most} more" if len(uids) > most else "")
