"""How long one run takes: by CUDA's events where runs are short and on a GPU, by the clock elsewhere.

`prepare` comes before every single run and is not timed, so that what overwrites its input reads fresh values.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from shapes import DEVICE, GPU

Action = Callable[[], Any]
FLUSH = 256 << 20
"""Bytes written over before a short run on a GPU: five times the L2 cache of an H100."""
REPEATS, SECONDS = (5, 100), 0.03
"""So many runs a round by events, about so long in all."""


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def by_clock(run: Action, prepare: Action | None = None, repeats: int = 1) -> float:
    """Mean seconds of one run, the device's work included."""
    took = 0.0
    gc.disable()
    try:
        for _ in range(repeats):
            if prepare:
                prepare()
            wait()
            start = time.perf_counter()
            run()
            wait()
            took += time.perf_counter() - start
    finally:
        gc.enable()
    return took / repeats


def by_events(run: Action, prepare: Action | None = None) -> float:
    """Median seconds of one run, by events around it alone.

    Whatever `prepare` or the run before left in the L2 cache is written over: all contenders find it in one state.
    """
    flush = torch.empty(FLUSH, dtype=torch.int8, device=DEVICE)

    def rounds(count: int) -> list[float]:
        pairs = []
        for _ in range(count):
            if prepare:
                prepare()
            flush.zero_()
            pairs.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
            pairs[-1][0].record()
            run()
            pairs[-1][1].record()
        torch.cuda.synchronize()
        return [first.elapsed_time(last) / 1000 for first, last in pairs]

    (once,) = rounds(1)
    least, most = REPEATS
    return statistics.median(rounds(max(least, min(most, int(SECONDS / max(once, 1e-9))))))
