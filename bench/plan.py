"""Which suites a command runs, and how many seconds each of them has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

RESERVE = 8.0
"""Seconds kept for the report at the end."""


@dataclass(frozen=True)
class Suite:
    """A process of pytest over some benchmarks: it wants so many seconds, and is not begun with fewer than `least`."""

    name: str
    want: float
    least: float

    @property
    def paths(self) -> tuple[str, ...]:
        return PATHS[self.name]


def _forms(form: str) -> tuple[str, ...]:
    return tuple(f"bench_forms.py::test_step[{form}-{size}]" for size in ("short", "long"))


PATHS = {
    "tests": ("gpu_kernels.py",),
    "kernels": ("bench_kernels.py", "bench_products.py"),
    "optimizer": ("bench_optimizer.py",),
    **{form: _forms(form) for form in ("packed", "padded", "equal")},
    "memory": ("bench_memory.py",),
    "methods": ("bench_step.py",),
    "scoring": ("bench_scoring.py",),
    "selection": ("bench_selection.py",),
}
"""Files, or single tests in them, of each suite. packed, padded, equal: a whole step on batches of that form."""

# In the order in which they run, and in which they count where time is short. A CPU's figures are about twice what its
# suites took on two cores; a GPU's are reckoned: none was at hand.
SUITES = {
    "cpu": (
        Suite("kernels", 220, 60),
        Suite("optimizer", 60, 20),
        Suite("packed", 300, 60),
        Suite("padded", 80, 20),
        Suite("methods", 400, 60),
        Suite("scoring", 300, 60),
        Suite("selection", 110, 20),  # works on the host
    ),
    "gpu": (
        Suite("tests", 60, 45),
        Suite("kernels", 45, 30),
        Suite("optimizer", 17, 15),
        Suite("packed", 110, 60),  # half of it the compiler's
        Suite("equal", 110, 60),
        Suite("padded", 110, 60),
    ),
    "gpu-record": (
        Suite("kernels", 45, 30),
        Suite("optimizer", 17, 15),
        Suite("packed", 110, 60),
        Suite("memory", 45, 30),
        Suite("methods", 55, 40),
        Suite("equal", 110, 60),
        Suite("padded", 110, 60),
        Suite("scoring", 80, 50),
    ),
    "gpu-peers": (Suite("kernels", 90, 45), Suite("methods", 140, 60)),
}
SECONDS = {"cpu": 1500, "gpu": 240, "gpu-record": 280, "gpu-peers": 280, "tune": 240, "gpu-run": 280}
"""What each command takes at most, unless --seconds says otherwise."""


def shares(suites: Sequence[Suite], seconds: float) -> list[float]:
    """Seconds of each suite: what it wants, or what is left where that is enough to begin it; 0: it is left out.

    They and RESERVE are at most `seconds`. A suite that does not fit makes way for a smaller one after it.
    """
    left, found = seconds - RESERVE, []
    for suite in suites:
        share = min(suite.want, left)
        found.append(share if share >= min(suite.least, suite.want) else 0.0)
        left -= found[-1]
    return found


def named(mode: str, names: Sequence[str]) -> tuple[Suite, ...]:
    """The suites of a command, or those of them that are named, by their names or files. Raises ValueError."""
    if not names:
        return SUITES[mode]
    every: dict[str, Suite] = {}
    for suite in (*SUITES[mode], *(suite for suites in SUITES.values() for suite in suites)):
        every.setdefault(suite.name, suite)
    found: list[Suite] = []
    for name in names:
        mine = [s for s in every.values() if name == s.name or any(p.split("::")[0] == name for p in s.paths)]
        if not mine:
            raise ValueError(f"no suite {name}: one of {' '.join(PATHS)}, or a file of bench/")
        found += mine
    return tuple(dict.fromkeys(found))
