"""Whole runs as a user starts them: torchrun and a recipe, on the embedded corpus and a base of a few hundred steps."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SMALL = {
    "--data.score-sentences": "30",
    "--data.train-sentences": "12",
    "--data.dev-sentences": "4",
    "--data.test-sentences": "4",
    "--train.epochs": "1",
    "--train.learning-rate": "0.01",
    "--evaluate.max-new-tokens": "12",
    "--train.report-to": "",
}
TWO_RANKS = ["--standalone", "--nproc_per_node", "2"]


def start(launcher: list[str], base: Path, out: Path, log: Path | None = None, **flags: str) -> subprocess.Popen:
    """A torchrun agent in a session of its own; it prints to a pipe, or to the file `log`."""
    settings = SMALL | {"--model.path": str(base), "--out": str(out)} | {f"--{k}": v for k, v in flags.items()}
    words = [w for pair in settings.items() for w in pair if w]
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, str(ROOT / "recipes/caneft_tiny.py"), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    output = log.open("w") if log else subprocess.PIPE
    return subprocess.Popen(
        command, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-4000:]
    return output


def wait_for(log: Path, words: str, process: subprocess.Popen, seconds: float = 300) -> None:
    """Until the run has printed `words`."""
    end = time.monotonic() + seconds
    while words not in log.read_text():
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < end, f"no {words!r} in {log.read_text()[-2000:]}"
        time.sleep(0.05)


def ranks(agent: subprocess.Popen) -> list[int]:
    """Process ids of an agent's ranks, the first rank's first (they are started in that order)."""
    found = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    called = {int(pid): Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in found}
    named = {pid: dict(e.split(b"=", 1) for e in entries if b"=" in e).get(b"RANK") for pid, entries in called.items()}
    return sorted((pid for pid, rank in named.items() if rank is not None), key=lambda pid: int(named[pid]))
