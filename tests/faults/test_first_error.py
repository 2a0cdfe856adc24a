"""One rank raises, or hangs, while the other waits in a collective; torchrun starts them again, with equal bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import faults
import pytest
from jobs import ROOT, TWO_RANKS

from slicetune.engine.common import checkpoint
from slicetune.engine.run import status


def launch(out, *options: str) -> subprocess.CompletedProcess:
    script = [str(ROOT / "tests/faults/failing_rank.py"), str(out)]
    command = [sys.executable, "-m", "torch.distributed.run", *TWO_RANKS, *options, *script]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


def ended(out):
    losses = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in losses}, checkpoint.load(checkpoint.newest(out / "checkpoints")[0])[0]


def test_a_failing_rank_is_heard_first_and_a_restart_loses_nothing(tmp_path):
    unbroken, out = tmp_path / "unbroken", tmp_path / "out"
    for folder in (unbroken, out):
        folder.mkdir()
    (unbroken / "failed").touch()
    assert launch(unbroken).returncode == 0
    restarted = launch(out, "--max-restarts", "1")
    assert restarted.returncode == 0, restarted.stderr[-3000:]
    lines = [line for line in restarted.stderr.splitlines() if line.startswith("error: ")]
    assert lines[0].startswith("error: rank 1: RuntimeError at failing_rank.py:")
    assert "a fault of rank 1" in lines[0]
    assert all("another rank has ended" in line for line in lines[1:])
    assert "resume: from" in restarted.stdout
    assert status.read(out)["state"] == "complete"
    (losses, weights), (whole, same) = ended(out), ended(unbroken)
    assert losses == whole
    assert faults.same(weights, same)


@pytest.mark.skipif("SLICETUNE_JOB_KILLS" not in os.environ, reason="waits for a time-out: `make faults` does")
def test_a_rank_that_hangs_ends_the_job_within_the_set_time(tmp_path):
    """Rank 1 neither works nor ends: the other's collective gives up, and the agent ends them all."""
    (tmp_path / "hang").touch()
    stuck = launch(tmp_path)
    assert stuck.returncode == 1
    assert "error: rank 0: another rank has ended" in stuck.stderr
    assert status.read(tmp_path)["state"] == "failed"
    assert checkpoint.newest(tmp_path / "checkpoints")[0].name == "step-4"
