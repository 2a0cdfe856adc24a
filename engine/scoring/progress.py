"""A scoring pass that resumes: each rank's statistics, saved at intervals, so that a broken pass goes on.

A rank adds batches in a fixed order, so from its own partial statistics it ends with the same bits, float64 sums too.
They lie in `scoring/rank-R/step-N` (N batches done), are written and verified as checkpoints are, and go when the
stage is done. Another number of ranks or other settings deal the batches differently: then the pass starts again.
Training resumes by training/saves.py, decoding by evaluation/translation.py (`Translated`).
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from ..common import checkpoint, distributed, signals

FILE = "statistics.safetensors"


class Partial(Protocol):
    """What can be saved half done: Statistics, and LANDeRMT's Detection."""

    @property
    def bytes(self) -> int: ...
    def save(self, path: Path) -> None: ...
    def reload(self, path: Path) -> Self: ...


P = TypeVar("P", bound=Partial)


class Progress:
    """Where one rank's scoring pass stands. `identity` (plain JSON) is what a partial must belong to."""

    def __init__(self, out: Path, identity: dict[str, Any], minutes: float) -> None:
        rank, world = distributed.rank(), distributed.world()
        self.root, self.seconds, self.last = out / "scoring" / f"rank-{rank}", 60 * minutes, time.monotonic()
        self.identity = identity | {"rank": rank, "world": world}

    def resume(self, fresh: P) -> tuple[P, int]:
        """The statistics to go on with, and how many of this rank's batches they hold; `fresh` and 0 at the start."""
        folder, faults = checkpoint.newest(self.root)
        for fault in faults:
            print(f"scoring: passed over {fault}", flush=True)
        if folder is None:
            return fresh, 0
        state = checkpoint.read_state(folder)
        if state["identity"] != self.identity:
            print(f"scoring: {folder} is of other settings or another number of ranks: from the start", flush=True)
            return fresh, 0
        print(f"scoring: rank {distributed.rank()} goes on after {state['step']} batches", flush=True)
        return fresh.reload(folder / FILE), state["step"]

    def after_batch(self, statistics: Partial, done: int) -> None:
        """Called equally often on every rank: save if it is time to, or if a signal came (then raise Interrupted)."""
        due = time.monotonic() - self.last >= self.seconds
        stopping, due = distributed.sums(float(signals.requested()), float(due and distributed.rank() == 0))
        if stopping or due:
            self.save(statistics, done)
        if stopping:
            distributed.barrier()  # nobody leaves before all have saved
            raise signals.interrupted("scoring")

    def save(self, statistics: Partial, done: int) -> None:
        """Write this rank's share. Raises UserError if the disk has no room; what was saved before stays."""
        state = {"step": done, "identity": self.identity}
        folder = self.root / f"step-{done}"
        checkpoint.write(folder, state, statistics.bytes, lambda partial: statistics.save(partial / FILE))
        checkpoint.prune(self.root, 1)
        self.last = time.monotonic()

    def clear(self) -> None:
        """Delete all ranks' shares once the whole is saved."""
        distributed.barrier()
        if distributed.rank() == 0:
            shutil.rmtree(self.root.parent, ignore_errors=True)
