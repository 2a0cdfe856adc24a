"""Comparisons: contenders timed in turn, round after round, in one process; a contender's check comes before its time.

    comparison = Comparison(benchmark, "step", "4 layers, 480 tokens")
    comparison.add("slices 1 %", make_slices, kind="ours")      # make_… builds, checks, and returns a Contender
    comparison.add("LoRA", make_lora)
    comparison.measure(seconds=60)                              # medians over rounds, into pytest-benchmark's JSON

Rounds take turns because a shared machine is not equally fast all the time: ratios within a run mean something,
absolute times less. A contender that is missing, fails or computes something else is a row that says so.
"""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from shapes import DEVICE, GPU, SMOKE
from torch import Tensor

ROOT = Path(__file__).parents[1]
Kind = Literal["ours", "floor", "rival", "peer"]
"""`floor` bounds what can be reached; a `peer` is another library or compiler: on a GPU it has a command of its own."""
PEERS = os.environ.get("SLICETUNE_BENCH_PEERS", "with")
WANTED = {
    "with": ("ours", "floor", "rival", "peer"),
    "without": ("ours", "floor", "rival"),
    "only": ("ours", "floor", "peer"),
}[PEERS]
PACKAGES = ("torch", "triton", "transformers", "peft", "deepspeed", "liger-kernel", "scikit-learn", "numpy")


class Wrong(Exception):
    """A contender computes something else than the others: it gets no time."""


@dataclass
class Contender:
    """`run` is timed; `prepare`, where given, comes before each run and is not."""

    run: Callable[[], Any]
    prepare: Callable[[], Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    """More columns of its row: bytes, flops, memory."""


class Comparison:
    """One table: contenders by name, all in one setting."""

    def __init__(self, benchmark: Any, suite: str, setting: str, micro: bool = False) -> None:
        """micro: runs are far shorter than a tick of the clock and are repeated within a round."""
        self.benchmark, self.suite, self.setting, self.micro = benchmark, suite, setting, micro
        self.rows: dict[str, dict[str, Any]] = {}
        self.live: dict[str, Contender] = {}
        self.times: dict[str, list[float]] = {}
        self.turn = 0

    def add(self, name: str, make: Callable[[], Contender], kind: Kind = "rival", **facts: Any) -> Contender | None:
        """Build and check a contender; what it raises becomes its row. None where it has no place in this run."""
        if kind not in WANTED:
            return None
        self.rows[name] = {"suite": self.suite, "setting": self.setting, "name": name, "kind": kind, **facts}
        contender = self._attempt(name, make)
        if contender is not None:
            self.live[name] = contender
            self.rows[name] |= contender.facts
        return contender

    def note(self, name: str, **facts: Any) -> None:
        """More columns for a row that is there."""
        if name in self.rows:
            self.rows[name] |= facts

    def measure(self, seconds: float, least_rounds: int = 3) -> dict[str, dict[str, Any]]:
        """Time all contenders for about `seconds`; returns the rows by name. Fails if one of ours has no time."""
        inner, once = self._warm()
        rounds = 1 if SMOKE else max(least_rounds, min(25, int(seconds / max(once, 1e-9))))
        self.times = {name: [] for name in self.live}
        self.benchmark.pedantic(self._round, args=(inner,), rounds=rounds, iterations=1, warmup_rounds=0)
        for name, times in self.times.items():
            if times and name in self.live:
                self.rows[name] |= _summary(times)
        self.benchmark.extra_info["rows"] = list(self.rows.values())
        self._keep()
        self._print()
        failed = [f"{n}: {row['error']}" for n, row in self.rows.items() if row["kind"] == "ours" and "error" in row]
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

    def _warm(self) -> tuple[dict[str, int], float]:
        """Two runs of each: how often each is repeated within a round (micro: 25 ms), and a round's seconds."""
        inner, once = {}, 0.0
        for name, contender in list(self.live.items()):
            for _ in range(2):
                took = self._attempt(name, lambda c=contender: self._time(c, 1, plain=True))
                if took is None:
                    break
            if took is not None:
                repeat = self.micro and not GPU and not SMOKE and contender.prepare is None
                inner[name] = max(1, min(1000, int(0.025 / took))) if repeat else 1
                once += 0.1 if self.micro and GPU else took * inner[name]
        return inner, once

    def _round(self, inner: dict[str, int]) -> None:
        names = list(self.live)
        start = self.turn % max(1, len(names))
        self.turn += 1
        gc.collect()
        for name in names[start:] + names[:start]:
            took = self._attempt(name, lambda n=name: self._time(self.live[n], inner[n]))
            if took is not None:
                self.times[name].append(took)

    def _time(self, contender: Contender, inner: int, plain: bool = False) -> float:
        """Seconds of one run."""
        if self.micro and GPU and not plain and contender.prepare is None:
            from triton.testing import do_bench

            return do_bench(contender.run, warmup=10, rep=30, quantiles=[0.5, 0.2, 0.8])[0] / 1000
        if contender.prepare:
            contender.prepare()
        gc.disable()
        _wait()
        start = time.perf_counter()
        for _ in range(inner):
            contender.run()
        _wait()
        took = (time.perf_counter() - start) / inner
        gc.enable()
        return took

    def _keep(self) -> None:
        """Rows on disk as soon as they are there, for run.py to find if this process is stopped later."""
        if path := os.environ.get("SLICETUNE_BENCH_ROWS"):
            with open(path, "a") as file:
                file.write(json.dumps({"rows": list(self.rows.values()), "provenance": provenance()}) + "\n")

    def _print(self) -> None:
        print(f"\n[{self.suite}] {self.setting}")
        for name, row in self.rows.items():
            print(f"  {name:44} {row.get('error') or seconds_text(row['seconds'])}", flush=True)


def _wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def _summary(times: list[float]) -> dict[str, Any]:
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


def provenance() -> dict[str, Any]:
    """Hardware, versions, commit and date of a run."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "device": torch.cuda.get_device_name() if GPU else "cpu",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if GPU else None,
        "cuda": torch.version.cuda,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": versions,
        "commit": os.environ.get("SLICETUNE_COMMIT") or _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "smoke": SMOKE,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", "engine", "kernels", "bench/*.py")
    return (commit or "unknown") + (" with changes" if commit and changed else "")


def _output(*command: str) -> str:
    """A command's output, empty where it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


assert DEVICE.type in ("cpu", "cuda")
