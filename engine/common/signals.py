"""SIGTERM and SIGINT: noted when they come, acted on at the next boundary, by all ranks together.

A scheduler signals one process, a torchrun agent or all ranks, and kills after 30 s. A rank that stopped where it
stands would leave the others waiting in a collective, so a signal is only noted; every boundary (an update, a scored
or a decoded batch, a stage) asks whether any rank has one. Later signals are noted too, so they spoil no save.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from . import distributed
from .errors import Interrupted

WATCHED = (signal.SIGTERM, signal.SIGINT)
_noted: list[str] = []


def install() -> None:
    """Note SIGTERM and SIGINT from now on (the main thread's privilege; elsewhere nothing changes)."""
    if threading.current_thread() is threading.main_thread():
        for number in WATCHED:
            signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    _noted.append(signal.Signals(number).name)
    if len(_noted) == 1:  # os.write: print could be in the middle of a line of its own
        os.write(2, f"{_noted[0]}: stopping at the next boundary, with everything saved\n".encode())


def requested() -> bool:
    """Whether this rank has had a signal."""
    return bool(_noted)


def forget() -> None:
    """Start anew in a process that outlives a run."""
    _noted.clear()


def boundary(what: str) -> None:
    """Raise Interrupted on every rank if any rank had a signal; a collective that all ranks call equally often."""
    if distributed.agree(float(requested())):
        raise interrupted(what)


def interrupted(what: str) -> Interrupted:
    """The exception of a stop during `what`, with the same words on every rank."""
    return Interrupted(f"interrupted by a signal while {what}: the same command goes on from here")
