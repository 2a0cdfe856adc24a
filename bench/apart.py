"""A contender in a process of its own, for one that changes the libraries that all contenders run on.

Liger's patch of one model also exchanges the rotary embedding, the norm and the MLP of transformers' Llama module, so
every model of the process would run them from then on. Here only the process that asked for them does.
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection

import clock
from harness import Contender


class Apart:
    """`make` (a module's function or a partial of one) is called in the new process; `run` runs its contender there."""

    def __init__(self, make: Callable[[], Contender]) -> None:
        context = get_context("spawn")  # fork would share CUDA's state
        self.here, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(make, there), daemon=True)
        self.process.start()
        there.close()
        self.facts = self._answer()

    def run(self) -> None:
        """One run, with all of its work on the device. Asking costs about 0.1 ms, which its time has in it."""
        self.here.send("run")
        self._answer()

    def close(self) -> None:
        self.here.close()
        self.process.join(10)
        self.process.kill()

    def _answer(self) -> dict:
        try:
            error, answer = self.here.recv()
        except EOFError:
            raise RuntimeError(f"its process ended with exit code {self.process.exitcode}") from None
        if error:
            raise RuntimeError(error)
        return answer


def contender(make: Callable[[], Contender]) -> Contender:
    apart = Apart(make)
    return Contender(apart.run, facts=apart.facts)


def _serve(make: Callable[[], Contender], there: Connection) -> None:
    """Answer (what went wrong, facts) to being made and to every run, until the other end is closed."""
    action = make
    while True:
        try:
            result = action()
            clock.wait()
            if action is make:
                action = result.run
                there.send(("", result.facts))
            else:
                there.send(("", {}))
        except Exception as error:
            there.send((f"{type(error).__name__}: {error}", {}))
            return
        try:
            there.recv()
        except EOFError:
            return
