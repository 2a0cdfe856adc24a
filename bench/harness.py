"""Comparisons: contenders timed in turn, round after round; a contender's check comes before its time.

    comparison = Comparison(benchmark, "step", "4 layers, 480 tokens")
    comparison.add("slices 1 %", make_slices, kind="ours")      # make_… builds, checks, and returns a Contender
    comparison.add("LoRA", make_lora)
    comparison.measure(seconds=60)                              # medians over rounds

Rounds take turns because a shared machine is not equally fast all the time: ratios within a run mean something,
absolute times less. A contender that is missing, fails or computes something else is a row that says so. A row is on
disk as soon as it has a time, and again whenever it has a better one: a process that is stopped loses one row at most.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import clock
import torch
from about import provenance
from shapes import GPU, SMOKE
from torch import Tensor

Row = dict[str, Any]
Kind = Literal["ours", "floor", "rival", "peer"]
"""`floor` bounds what can be reached; a `peer` is another library or compiler: on a GPU it has a command of its own."""
PEERS = os.environ.get("SLICETUNE_BENCH_PEERS", "with")
WANTED = {
    "with": ("ours", "floor", "rival", "peer"),
    "without": ("ours", "floor", "rival"),
    "only": ("ours", "floor", "peer"),
}[PEERS]
UNTIL = float(os.environ.get("SLICETUNE_BENCH_UNTIL", "inf"))
"""When this process should be done (seconds of time.time()): run.py stops it soon after."""
LATE = "left out: no time"


class Wrong(Exception):
    """A contender computes something else than the others: it gets no time."""


@dataclass
class Contender:
    """`run` is timed; `prepare`, where given, comes before each run and is not."""

    run: Callable[[], Any]
    prepare: Callable[[], Any] | None = None
    facts: Row = field(default_factory=dict)
    """More columns of its row: bytes, flops, memory."""


class Comparison:
    """One table: contenders by name, all in one setting."""

    def __init__(
        self,
        benchmark: Any,
        suite: str,
        setting: str,
        micro: bool = False,
        derive: Callable[[Row], Row] | None = None,
    ) -> None:
        """micro: runs are short, and repeated within a round. derive: more columns of a row that has its time."""
        self.benchmark, self.suite, self.setting, self.micro, self.derive = benchmark, suite, setting, micro, derive
        self.rows: dict[str, Row] = {}
        self.live: dict[str, Contender] = {}
        self.times: dict[str, list[float]] = {}
        self.first: dict[str, float] = {}
        self.turn = 0

    def add(self, name: str, make: Callable[[], Contender], kind: Kind = "rival", **facts: Any) -> Contender | None:
        """Build, check and run a contender; what it raises becomes its row. None where it has no place in this run."""
        if kind not in WANTED:
            return None
        self.rows[name] = {"suite": self.suite, "setting": self.setting, "name": name, "kind": kind, **facts}
        if time.time() > UNTIL:
            self.rows[name]["error"] = LATE
        else:
            contender = self._attempt(name, make)
            if contender is not None:
                self.live[name] = contender
                self.rows[name] |= contender.facts
                self._warm(name, contender)
        self._keep(name)
        return self.live.get(name)

    def measure(self, seconds: float, least_rounds: int = 3) -> dict[str, Row]:
        """Time all contenders for about `seconds`; returns the rows by name. Fails if one of ours has failed."""
        inner = {name: self._repeats(name) for name in self.live}
        short = self.micro and GPU
        once = sum(0.1 if short else self.first[name] * inner[name] for name in self.live)
        seconds = min(seconds, UNTIL - time.time())
        rounds = 1 if SMOKE else max(least_rounds, min(25, int(seconds / max(once, 1e-9))))
        self.times = {name: [] for name in self.live}
        self.benchmark.pedantic(self._round, args=(inner,), rounds=rounds, iterations=1, warmup_rounds=0)
        self.benchmark.extra_info["rows"] = list(self.rows.values())
        wrong = {n: row["error"] for n, row in self.rows.items() if row["kind"] == "ours" and "error" in row}
        failed = [f"{name}: {error}" for name, error in wrong.items() if error != LATE]
        assert not failed, "; ".join(failed)
        return self.rows

    def _attempt(self, name: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # a peer's failure is a result
            reason = str(error).strip().split("\n")[0][:200]
            self.rows[name]["error"] = reason if isinstance(error, Wrong) else f"{type(error).__name__}: {reason}"
            self.live.pop(name, None)
            if GPU:
                torch.cuda.empty_cache()
            return None

    def _warm(self, name: str, contender: Contender) -> None:
        """Two runs; the second is its time until the rounds have a better one."""
        for _ in range(2):
            took = self._attempt(name, lambda: clock.by_clock(contender.run, contender.prepare))
            if took is None:
                return
        self.first[name] = took
        self.rows[name] |= _summary([took])

    def _repeats(self, name: str) -> int:
        """How often a short run is repeated within a round on a CPU, where it has about 25 ms."""
        many = self.micro and not GPU and not SMOKE
        return max(1, min(1000, int(0.025 / max(self.first[name], 1e-9)))) if many else 1

    def _round(self, inner: dict[str, int]) -> None:
        names = list(self.live)
        start = self.turn % max(1, len(names))
        self.turn += 1
        gc.collect()
        for name in names[start:] + names[:start]:
            if time.time() > UNTIL:
                return
            took = self._attempt(name, lambda n=name: self._time(self.live[n], inner[n]))
            if took is not None:
                self.times[name].append(took)
                self.rows[name] |= _summary(self.times[name])
            self._keep(name)

    def _time(self, contender: Contender, inner: int) -> float:
        """Seconds of one run."""
        if self.micro and GPU:
            return clock.by_events(contender.run, contender.prepare)
        return clock.by_clock(contender.run, contender.prepare, inner)

    def _keep(self, name: str) -> None:
        """The row on disk, for run.py to find: the last line of a row counts."""
        row = self.rows[name]
        if self.derive and "seconds" in row and "error" not in row:
            row |= self.derive(row)
        if path := os.environ.get("SLICETUNE_BENCH_ROWS"):
            with open(path, "a") as file:
                file.write(json.dumps({"row": row, "provenance": provenance()}) + "\n")


def _summary(times: list[float]) -> Row:
    ordered = sorted(times)
    low, high = ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5]
    return {"seconds": statistics.median(ordered), "low": low, "high": high, "rounds": len(ordered)}


def seconds_text(seconds: float) -> str:
    """Four significant digits in s, ms or µs."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size or unit == "µs":
            return f"{seconds / size:.4g} {unit}"
    raise AssertionError


def agree(got: Tensor, want: Tensor, tolerance: float, what: str = "result") -> None:
    """Raises Wrong where ‖got − want‖ / ‖want‖, in float64, is above `tolerance` or not a number."""
    if got.shape != want.shape:
        raise Wrong(f"{what} has shape {tuple(got.shape)}, not {tuple(want.shape)}")
    got, want = got.detach().to(torch.float64), want.detach().to(torch.float64)
    error = float((got - want).norm() / want.norm().clamp_min(1e-300))
    if not error <= tolerance:
        raise Wrong(f"{what} is wrong: relative error {error:.2g} is above {tolerance:.2g}")


def tolerance(dtype: torch.dtype) -> float:
    """Relative error of one elementwise result that was rounded to `dtype` once or twice."""
    return {torch.float32: 2e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}[dtype]
