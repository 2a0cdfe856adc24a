"""One rank raises while the other waits in a collective: it is heard first; started again, it ends with equal bits."""

from __future__ import annotations

import json
import subprocess
import sys

import faults
from jobs import ROOT, TWO_RANKS

from slicetune.engine import checkpoint, status


def launch(out) -> subprocess.CompletedProcess:
    script = [str(ROOT / "tests/failing_rank.py"), str(out)]
    command = [sys.executable, "-m", "torch.distributed.run", *TWO_RANKS, *script]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def ended(out):
    losses = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in losses}, checkpoint.load(checkpoint.newest(out / "checkpoints")[0])[0]


def test_a_failing_rank_is_heard_first_and_a_restart_loses_nothing(tmp_path):
    unbroken, out = tmp_path / "unbroken", tmp_path / "out"
    for folder in (unbroken, out):
        folder.mkdir()
    (unbroken / "failed").touch()
    assert launch(unbroken).returncode == 0
    failed = launch(out)
    assert failed.returncode == 1
    lines = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert lines[0].startswith("error: rank 1: RuntimeError at failing_rank.py:")
    assert all("another rank has ended" in line for line in lines[1:])
    assert "a fault of rank 1" in status.read(out)["message"]
    restarted = launch(out)
    assert restarted.returncode == 0, restarted.stderr[-3000:]
    assert status.read(out)["state"] == "complete"
    (losses, weights), (whole, same) = ended(out), ended(unbroken)
    assert losses == whole
    assert faults.same(weights, same)
