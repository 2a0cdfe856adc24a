"""How a program speaks: it says everything in any encoding, and shows how far it is on a terminal and in a log.

    with Bar("score", 40_000, "sentence") as bar:
        bar.add(128)

On a terminal that is a bar. A log (a pipe, Slurm's file) would get thousands of redrawn bars in one line: it gets a
plain line every half minute, `score: 5,120 of 40,000 sentences, 166 a second, 03:30 left`.
"""

from __future__ import annotations

import io
import os
import sys
import time
from typing import Any

from . import distributed

EVERY = 30.0
"""Seconds between two lines of a log."""


def prepare() -> None:
    """To be called where a program starts: output never ends it, and other libraries' bars do not fill its log.

    A batch system's output is often ASCII (LC_ALL=C, PYTHONIOENCODING): what that lacks is written as `\\\\u27e6`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not sys.stderr.isatty():
        for library in ("HUB", "DATASETS"):  # read when they are imported; transformers does as the hub's client
            os.environ.setdefault(f"HF_{library}_DISABLE_PROGRESS_BARS", "1")


class Bar:
    """How far a stage is, on the first rank's stdout; the others are silent."""

    def __init__(self, stage: str, total: int, unit: str, done: int = 0) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.before = self.done = done
        self.note = ""
        self.start = self.last = time.monotonic()
        self.first = distributed.rank() == 0
        self.tqdm: Any = None
        if self.first and sys.stdout.isatty():
            from tqdm import tqdm

            shown = {"mininterval": 2, "file": sys.stdout, "disable": False}
            self.tqdm = tqdm(total=total, initial=done, desc=stage, unit=unit, **shown)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def add(self, count: int) -> None:
        """So many more are done: never more than all, though ranks end a few apart."""
        count = min(count, self.total - self.done)
        self.done += count
        if self.tqdm is not None:
            self.tqdm.update(count)
        elif self.first and (now := time.monotonic()) - self.last >= EVERY:
            self.last = now
            print(self._line(now), flush=True)

    def tell(self, note: str) -> None:
        """What stands behind the numbers from now on (the loss …)."""
        self.note = note
        if self.tqdm is not None:
            self.tqdm.set_postfix_str(note)

    def write(self, line: str) -> None:
        """A line of its own, beside the bar."""
        if self.tqdm is not None:
            self.tqdm.write(line, file=sys.stdout)
        elif self.first:
            print(line, flush=True)

    def close(self) -> None:
        """End it; a log gets a last line if anything was done since the start."""
        if self.tqdm is not None:
            self.tqdm.close()
        elif self.first and self.done > self.before:
            print(self._line(time.monotonic()), flush=True)
        self.first, self.tqdm = False, None

    def _line(self, now: float) -> str:
        seconds = max(now - self.start, 1e-9)
        rate = (self.done - self.before) / seconds
        if self.done < self.total:
            when = f"{_clock((self.total - self.done) / rate)} left" if rate else "no end in sight"
        else:
            when = f"in {_clock(seconds)}"
        amount = f"{self.done:,} of {self.total:,} {self.unit}s"
        return ", ".join([f"{self.stage}: {amount}", f"{rate:.3g} a second", when, *([self.note] if self.note else [])])


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
