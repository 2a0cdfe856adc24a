"""Which stages of a run are done, with which settings: a finished stage is not run again, a changed one is refused.

Which settings decide a stage is said on the field: `matters` in common/settings.py; run.py puts them together.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..common import distributed, private, signals
from ..common.errors import UserError
from ..common.files import write_json
from ..common.settings import differences, table
from ..training.metrics import peak_memory, reset_peak_memory


class Stages:
    """The record `stages.json` of an output folder: for every finished stage its settings and its wall time.

    `do` runs a stage once. Settings accumulate: a stage depends on its own and on all before it.
    """

    def __init__(self, out: Path) -> None:
        self.path = out / "stages.json"
        self.record: dict[str, Any] = _read(self.path)
        self.settings: dict[str, Any] = {}

    def do(self, name: str, settings: dict[str, Any], artefact: Path, work: Callable[[], Any]) -> None:
        """Run `work` unless `artefact` is there and was made with the same settings.

        Raises UserError with the differences if it was made with others.
        """
        self.settings |= settings
        done = self.record.get(name)
        if done and artefact.exists():
            if other := self._differences(done):
                folder = self.path.parent
                scored = name != "score" and "score" in self.record
                again = f"; with --score.reuse {folder} it need not score again" if scored else ""
                raise UserError(f"{artefact} was made with other settings ({other}): use another --out{again}")
            distributed.print0(f"[{name}] done before ({done['seconds']:.1f} s)")
            return
        self._work(name, dict(self.settings), work)

    def _work(self, name: str, settings: dict[str, Any], work: Callable[[], Any]) -> None:
        """Do the work of a stage on every rank, and record it."""
        signals.boundary(f"before the {name} stage")
        distributed.print0(f"[{name}]")
        start = time.perf_counter()
        private.collect()
        reset_peak_memory()
        with named(name):
            work()
        peak = int(distributed.agree(peak_memory()))
        seconds = time.perf_counter() - start
        self.record[name] = {"settings": settings, "seconds": seconds, "peak_memory_bytes": peak}
        if distributed.rank() == 0:
            write_json(self.path, self.record)

    def first(self, name: str, settings: dict[str, Any], artefact: Path, work: Callable[[], Any]) -> None:
        """As `do`; the first rank alone works, the others wait."""
        self.do(name, settings, artefact, lambda: distributed.first(work))

    def take(self, name: str, other: Path, artefact: Path) -> None:
        """Let `artefact` be the one that stage `name` of the run in folder `other` has made (a hard link or a copy).

        Raises UserError if that stage is not finished there, or was run with other settings than these.
        """
        made, done = other / artefact.name, _read(other / "stages.json").get(name)
        if not done or not made.exists():
            raise UserError(f"--{name}.reuse {other}: no finished {name} stage there: name a run's --out")
        if rows := self._differences(done):
            raise UserError(f"--{name}.reuse {other}: made with other settings ({rows}): leave it out to {name} anew")
        artefact.unlink(missing_ok=True)
        try:
            os.link(made, artefact)
        except OSError:  # another file system, or one without links
            shutil.copy(made, artefact)

    def _differences(self, done: dict[str, Any]) -> str:
        """What a finished stage's settings and the present ones differ in, as text; empty if nothing."""
        return table(differences(done["settings"], json.loads(json.dumps(self.settings))))

    def aside(self, name: str, settings: dict[str, Any], artefact: Path, work: Callable[[], Any]) -> None:
        """As `do`, of a stage that nothing follows from: its settings are its own, and changed ones run it again."""
        done = self.record.get(name)
        if done and artefact.exists() and not differences(done["settings"], settings):
            distributed.print0(f"[{name}] done before ({done['seconds']:.1f} s)")
            return
        self._work(name, settings, work)

    def seconds(self) -> dict[str, float]:
        """Wall time of every finished stage, in their order."""
        return {name: entry["seconds"] for name, entry in self.record.items()}

    def peaks(self) -> dict[str, int]:
        """Peak bytes of the rank that held most, of every stage of which that is known."""
        known = "peak_memory_bytes"
        return {name: entry[known] for name, entry in self.record.items() if known in entry}


@contextlib.contextmanager
def named(stage: str) -> Iterator[None]:
    """An error within says in a note which stage it is of: a failed write alone does not say which file."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in the {stage} stage")
        raise


def _read(path: Path) -> dict[str, Any]:
    """The record; empty if there is none. Raises UserError for one that no run has written."""
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        whole = all({"settings", "seconds"} <= entry.keys() for entry in record.values())
    except (OSError, ValueError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise UserError(f"{path}: not a record of stages: delete it to run all stages again, or use another --out")
    return record


class Lock:
    """One run in one output folder: held by the first rank until `with` or the process ends. Refused, all raise."""

    def __init__(self, out: Path) -> None:
        self.out, self.file = out, None
        distributed.first(self._take)

    def _take(self) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.file = (self.out / ".lock").open("a+")
        except OSError as error:
            raise UserError(f"--out {self.out}: cannot be written ({error.strerror}): name another folder") from None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.seek(0)
            holder = self.file.read().strip()
            raise UserError(f"{self.out}: another run writes here ({holder}): use another --out") from None
        self.file.truncate(0)
        self.file.write(f"host {socket.gethostname()}, process {os.getpid()}")
        self.file.flush()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *error: object) -> None:
        if self.file is not None:
            self.file.close()
