"""A scoring pass that resumes: what each rank has, saved at intervals, so that a broken pass goes on.

All ranks save the same turn of the pass, rank R in `scoring/rank-R/step-N`: N batches of the one deterministic list are
done. Each part is written and verified as checkpoints are, and an older turn goes only when all parts of the newer one
are there. As many ranks as before end with the bits of an unbroken pass, float64 sums too; another number of ranks
deals the rest of the list out anew, and ends with the same counts. Other settings start again. All of it goes when the
stage is done. Training resumes by training/saves.py, decoding by evaluation/translation.py (`Translated`).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..common import checkpoint, distributed, signals
from ..common.errors import UserError

FILE = "statistics.safetensors"


class Partial(Protocol):
    """What can be saved half done: a Share of statistics, and LANDeRMT's Detection."""

    @property
    def bytes(self) -> int: ...
    def save_part(self, path: Path) -> None: ...
    def take(self, parts: Sequence[Path]) -> None: ...


@dataclass
class Turn:
    """One save of all ranks."""

    step: int
    """Batches of the list that are done."""
    dealt: list[list[int]]
    """From which batch on how many ranks shared the list: [[0, 2], [20, 3]]. What a part holds follows from it."""
    parts: list[Path]
    """Each rank's folder."""


class Progress:
    """Where a scoring pass stands. `identity` (plain JSON) is what a save must belong to."""

    def __init__(self, out: Path, identity: dict[str, Any], minutes: float) -> None:
        self.root, self.seconds, self.last = out / "scoring", 60 * minutes, time.monotonic()
        self.identity, self.dealt = identity, [[0, distributed.world()]]

    def resume(self, fresh: Partial) -> int:
        """Fill `fresh` with what was saved; how many batches of the list that is, 0 at the start: a collective."""
        turn, world = self._newest(), distributed.world()
        if turn is None:
            return 0
        fresh.take([part / FILE for part in turn.parts])
        before = turn.dealt[-1][1]
        self.dealt = turn.dealt if before == world else [*turn.dealt, [turn.step, world]]
        note = "" if before == world else f", the rest dealt out to {world} ranks instead of {before}"
        distributed.print0(f"scoring: goes on after {turn.step} batches{note}")
        return turn.step

    def _newest(self) -> Turn | None:
        """The newest turn whose parts are all whole, the same on every rank; what was passed over is named."""
        rank, world = distributed.rank(), distributed.world()
        found, notes = distributed.share_object(turns(self.root, self.identity) if rank == 0 else None)
        chosen = None
        for turn in found:
            bad = distributed.collect([fault for p in turn.parts[rank::world] if (fault := checkpoint.fault(p))])
            if not any(bad):
                chosen = turn
                break
            notes += [f"passed over {fault}" for of_rank in bad for fault in of_rank]
        for note in notes:
            distributed.print0(f"scoring: {note}")
        return chosen

    def after_batch(self, statistics: Partial, done: int) -> None:
        """Called equally often on every rank: save if it is time to, or if a signal came (then raise Interrupted)."""
        due = time.monotonic() - self.last >= self.seconds
        stopping, due = distributed.sums(float(signals.requested()), float(due and distributed.rank() == 0))
        if stopping or due:
            self.save(statistics, done)
        if stopping:
            raise signals.interrupted("scoring")

    def save(self, statistics: Partial, done: int) -> None:
        """Write every rank's part, then delete older turns: a collective.

        Raises UserError on all ranks if one of them has no room; what was saved before stays.
        """
        state = {"step": done, "rank": distributed.rank(), "dealt": self.dealt, "identity": self.identity}
        folder, problem = self.root / f"rank-{distributed.rank()}" / f"step-{done}", None
        try:
            checkpoint.write(folder, state, statistics.bytes, lambda partial: statistics.save_part(partial / FILE))
        except UserError as error:
            problem = str(error)
        problems = [each for each in distributed.collect(problem) if each]  # nobody goes on before all have written
        if problems:
            raise UserError(problems[0], agreed=True)
        if distributed.rank() == 0:
            prune(self.root, done, distributed.world())
        self.last = time.monotonic()

    def clear(self) -> None:
        """Delete all ranks' parts once the whole is saved."""
        distributed.barrier()
        if distributed.rank() == 0:
            shutil.rmtree(self.root, ignore_errors=True)


def turns(root: Path, identity: dict[str, Any]) -> tuple[list[Turn], list[str]]:
    """The saves under `root` that belong to `identity` and have all parts, newest first, and notes on the others.

    The parts are not verified yet. Parts of one number of batches belong together only if the list was dealt alike.
    """
    found: dict[str, dict[int, Path]] = {}
    notes, others = [], 0
    for folder in sorted(root.glob("rank-*/step-*")):
        if folder.suffix:  # .partial: a kill while it was written; .stale: a kill after it was replaced
            notes += [f"passed over {checkpoint.fault(folder)}"] if folder.suffix == ".partial" else []
            continue
        try:
            state = checkpoint.read_state(folder)
            rank, key = int(state["rank"]), json.dumps([state["step"], _dealt(state["dealt"])])
        except UserError as error:
            notes.append(f"passed over {error}")
            continue
        except (KeyError, TypeError, ValueError):
            notes.append(f"passed over {folder / 'state.json'}: not the state of a part of scoring")
            continue
        others += state["identity"] != identity
        if state["identity"] == identity:
            found.setdefault(key, {})[rank] = folder
    whole = []
    for key, parts in found.items():
        step, dealt = json.loads(key)
        if sorted(parts) == list(range(ranks := dealt[-1][1])):
            whole.append(Turn(step, dealt, [parts[rank] for rank in range(ranks)]))
        else:
            kept = f"{len(parts)} of {ranks} ranks' parts"
            notes.append(f"passed over {root}/rank-*/step-{step}: {kept} are there, the save was cut short")
    if others and not found:
        notes.append(f"{root} is of other settings: from the start")
    return sorted(whole, key=lambda turn: -turn.step), notes


def _dealt(value: Any) -> list[list[int]]:
    """`Turn.dealt` as a file has it. Raises ValueError or TypeError for anything else."""
    dealt = [[int(first), int(ranks)] for first, ranks in value]
    if not dealt or any(first < 0 or ranks < 1 for first, ranks in dealt):
        raise ValueError("no list of batches and ranks")
    return dealt


def prune(root: Path, step: int, ranks: int) -> None:
    """Delete what is not a part of the turn `step` of so many ranks."""
    keep = {root / f"rank-{rank}" / f"step-{step}" for rank in range(ranks)}
    for folder in root.glob("rank-*/step-*"):
        if folder not in keep:
            shutil.rmtree(folder, ignore_errors=True)
