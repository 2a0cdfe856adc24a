"""Processes that are killed on purpose: one that has its imports done forks a child for every trial.

    killer = Killer()
    trial = killer.run("save_one", (folder,), kill=(17, "before"))     # SIGKILL before its 17th disk operation
    trial.code, trial.operations, trial.error

A disk operation is a write, fsync, rename, mkdir, unlink or rmdir that a job of fault_jobs.py makes. `kill` is
(number from 1, "before" | "half" | "after"): half of a write's bytes reach the file. `fail` is (number, errno): that
operation and all later writes raise OSError, as on a full disk.
"""

from __future__ import annotations

import builtins
import io
import os
import pickle
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.multiprocessing as mp

KILLED = -signal.SIGKILL


@dataclass
class Trial:
    """How a child ended: exit code (negative: the signal), operations it made, its exception, what it returned."""

    code: int
    operations: list[str]
    error: str
    value: Any


class Disk:
    """Counts what a process asks of the disk, from `arm` on, and strikes at one operation."""

    def __init__(self, pipe: int, kill: tuple[int, str] | None, fail: tuple[int, int] | None) -> None:
        self.pipe, self.kill, self.fail, self.count = pipe, kill, fail, 0

    def arm(self) -> None:
        for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
            setattr(os, name, self._around(name, getattr(os, name)))
        opened = io.open

        def watched(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not isinstance(file, int) and mode in ("wb", "w"):
                raw = _CountedFile(file, "wb")
                raw.disk = self
                buffered = io.BufferedWriter(raw)
                return buffered if mode == "wb" else io.TextIOWrapper(buffered, encoding="utf-8")
            return opened(file, mode, *args, **kwargs)

        builtins.open = io.open = watched

    def strike(self, name: str, half: Callable[[], Any] = lambda: None) -> Callable[[], None]:
        """Before an operation; returns what is to be called after it."""
        self.count += 1
        os.write(self.pipe, f"{name}\n".encode())
        if self.fail and (self.count == self.fail[0] or (self.count > self.fail[0] and name == "write")):
            raise OSError(self.fail[1], os.strerror(self.fail[1]))
        mine = self.kill is not None and self.kill[0] == self.count
        if mine and self.kill[1] != "after":
            if self.kill[1] == "half":
                half()
            os.kill(os.getpid(), signal.SIGKILL)
        return lambda: os.kill(os.getpid(), signal.SIGKILL) if mine else None

    def _around(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            after = self.strike(name)
            try:
                return real(*args, **kwargs)
            finally:  # mkdir(exist_ok=True) raises inside
                after()

        return counted


class _CountedFile(io.FileIO):
    disk: Disk

    def write(self, data: Any) -> int:
        view = memoryview(data)
        after = self.disk.strike("write", lambda: super(_CountedFile, self).write(view[: len(view) // 2]))
        written = super().write(view)
        after()
        return written


def _child(job: str, args: tuple, kill: Any, fail: Any, pipe: int, answer: int) -> None:
    import fault_jobs

    code = 0
    try:
        value = (getattr(fault_jobs, job)(Disk(pipe, kill, fail), *args), "")
    except BaseException:
        value, code = (None, traceback.format_exc()), 1
    os.close(pipe)  # else the server waits for operations, and this for the server to read the answer
    with os.fdopen(answer, "wb") as file:
        pickle.dump(value, file)
    os._exit(code)


def _serve(jobs: Any, results: Any) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    import fault_jobs

    fault_jobs.warm_up()
    while (task := jobs.get()) is not None:
        operations, answer = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(operations[0])
            os.close(answer[0])
            _child(*task, operations[1], answer[1])
        os.close(operations[1])
        os.close(answer[1])
        made, said = _drain(operations[0]).decode().split(), _drain(answer[0])
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        results.put(Trial(code, made, *reversed(pickle.loads(said) if said else (None, ""))))


def _drain(handle: int) -> bytes:
    with open(handle, "rb") as file:
        return file.read()


class Killer:
    """The process with its imports done; spawned, so that it has no threads of the tests' process."""

    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self.jobs, self.results = context.Queue(), context.Queue()
        self.process = context.Process(target=_serve, args=(self.jobs, self.results), daemon=True)
        self.process.start()

    def run(
        self,
        job: str,
        *args: Any,
        kill: tuple[int, str] | None = None,
        fail: tuple[int, int] | None = None,
        timeout: float = 300,
    ) -> Trial:
        self.start(job, *args, kill=kill, fail=fail)
        return self.results.get(timeout=timeout)

    def start(
        self, job: str, *args: Any, kill: tuple[int, str] | None = None, fail: tuple[int, int] | None = None
    ) -> None:
        """Begin a trial; `results` gets it when it has ended."""
        self.jobs.put((job, args, kill, fail))

    def close(self) -> None:
        self.jobs.put(None)
        self.process.join(timeout=10)
        self.process.kill()
