"""Scoring and decoding that resume.

Scoring: each rank's statistics, saved at intervals, so that a broken pass goes on where it stopped.
A rank adds batches in a fixed order, so from its own partial statistics it ends with the same bits, float64 sums too.
They lie in `scoring/rank-R/step-N` (N batches done), are written and verified as checkpoints are, and go when the
stage is done. Another number of ranks or other settings deal the batches differently: then the pass starts again.

Decoding: a domain whose translations are written is not decoded again. A whole domain is what is kept, since a part of
one is minutes on the machines that decode for hours.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from . import checkpoint, distributed, signals
from .stages import write_atomically
from .translation import write_lines

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


class Translated:
    """Which domains of a system are translated: `translations/<system>/finished.json` has each file's sha256.

    `identity` (plain JSON) is what they must have been made with: model, sentences, settings.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.record, self.identity = folder, folder / "finished.json", json.loads(json.dumps(identity))

    def has(self, name: str) -> bool:
        """Whether the file `name` is there, whole and of this identity; the same on every rank (a collective)."""
        return distributed.share_object(distributed.first(lambda: self._finished().get(name) == self._digest(name)))

    def write(self, name: str, lines: Sequence[str]) -> None:
        """Write `lines` to the file `name`, and that it is finished. The first rank alone calls it."""
        kept = {other: digest for other, digest in self._finished().items() if (self.folder / other).is_file()}
        write_lines(self.folder / name, lines)
        content = {"identity": self.identity, "files": kept | {name: self._digest(name)}}
        write_atomically(self.record, json.dumps(content, indent=1))

    def _finished(self) -> dict[str, str]:
        try:
            content = json.loads(self.record.read_text(encoding="utf-8"))
            files = content["files"] if content["identity"] == self.identity else {}
            return files if isinstance(files, dict) else {}
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return {}

    def _digest(self, name: str) -> str:
        path = self.folder / name
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
