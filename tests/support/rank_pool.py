"""Two ranks over gloo that stay up for the whole test run: starting DeepSpeed takes longer than most tests.

A job is a function of rank_jobs.py; `pool.run("name", …)` runs it on both ranks and returns both results.
"""

from __future__ import annotations

import os
import socket
import traceback
from typing import Any

import torch.multiprocessing as mp


def _serve(rank: int, world: int, port: int, jobs: Any, results: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    import torch

    torch.set_num_threads(1)
    import rank_jobs

    from slicetune.engine.common import distributed

    distributed.start(timeout_minutes=3)
    while (job := jobs.get()) is not None:
        name, args = job
        try:
            results.put((rank, getattr(rank_jobs, name)(*args), None))
        except Exception:
            results.put((rank, None, traceback.format_exc()))
    distributed.stop()


class Pool:
    def __init__(self, world: int = 2) -> None:
        context = mp.get_context("spawn")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.jobs = [context.Queue() for _ in range(world)]
        self.results = context.Queue()
        self.ranks = [
            context.Process(target=_serve, args=(r, world, port, self.jobs[r], self.results), daemon=True)
            for r in range(world)
        ]
        for process in self.ranks:
            process.start()

    def run(self, name: str, *args: Any, timeout: float = 300) -> list[Any]:
        """The job's results, rank 0's first. Raises AssertionError with a rank's traceback."""
        for queue in self.jobs:
            queue.put((name, args))
        answers = [self.results.get(timeout=timeout) for _ in self.ranks]
        for rank, _, error in answers:
            assert error is None, f"rank {rank} failed:\n{error}"
        return [value for _, value, _ in sorted(answers, key=lambda answer: answer[0])]

    def close(self) -> None:
        for queue in self.jobs:
            queue.put(None)
        for process in self.ranks:
            process.join(timeout=10)
            process.kill()
