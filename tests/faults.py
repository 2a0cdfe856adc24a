"""`make faults`: every fault of the table in full; writes tests/FAULTS.md. The tests run the same trials, fewer.

python tests/faults.py                 # all
python tests/faults.py --points 20     # a sample
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fault_jobs import tensors
from fault_pool import KILLED, Killer

from slicetune.engine import checkpoint

TESTS = Path(__file__).parent
MOMENTS = ("before", "half", "after")
Point = tuple[int, str, str]
"""Number of the disk operation from 1, when, which."""


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, through dictionaries; of dictionaries the keys that both have."""
    if isinstance(a, dict):
        return bool(a.keys() & b.keys()) and all(same(a[key], b[key]) for key in a.keys() & b.keys())
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else True


def prepare(root: Path) -> None:
    """Two whole checkpoints and one that a kill left unfinished; the next save replaces the newer one."""
    shutil.rmtree(root / "checkpoints", ignore_errors=True)
    root = root / "checkpoints"
    for step in (2, 4):
        checkpoint.save(root / f"step-{step}", tensors(step), {"step": step})
    shutil.copytree(root / "step-2", root / "step-3.partial")


def points(killer: Killer, root: Path) -> list[Point]:
    """Every operation of a save and its pruning, where the same step was saved before, at every moment."""
    prepare(root)
    trial = killer.run("save_one", str(root / "checkpoints"), 4, 1)
    assert trial.code == 0, trial.error
    moments = {"write": MOMENTS}
    named = enumerate(trial.operations, 1)
    return [(number, when, name) for number, name in named for when in moments.get(name, ("before", "after"))]


def kill_a_save(killer: Killer, root: Path, number: int, when: str) -> str | None:
    """What went wrong, or None: killed there, the newest whole checkpoint is the old or the new step 4."""
    prepare(root)
    folder = root / "checkpoints"
    trial = killer.run("save_one", str(folder), 4, 1, kill=(number, when))
    if trial.code != KILLED:
        return f"it ended with {trial.code}: {trial.error}"
    newest, _ = checkpoint.newest(folder)
    if newest is None or not newest.name.startswith("step-4"):
        return f"the newest whole checkpoint is {newest}"
    loaded, state = checkpoint.load(newest)
    if state["step"] != 4 or not same(loaded, tensors(4)):
        return f"{newest} holds something else"
    again = killer.run("save_one", str(folder), 6, 1)
    left = sorted(p.name for p in folder.iterdir())
    return None if again.code == 0 and left == ["step-6"] else f"the next save left {left}: {again.error}"


def fail_a_save(killer: Killer, root: Path, number: int, code: int) -> str | None:
    """What went wrong, or None: the disk fails from there on, the error is one line, and step 4 is whole."""
    prepare(root)
    folder = root / "checkpoints"
    trial = killer.run("save_one", str(folder), 4, 1, fail=(number, code))
    if trial.code and "UserError" not in trial.error:
        return trial.error
    newest, _ = checkpoint.newest(folder)
    return None if newest and newest.name.startswith("step-4") else f"the newest whole checkpoint is {newest}"


def kill_training(killer: Killer, out: Path, point: tuple[int, str], unbroken: Any) -> str | None:
    """What went wrong, or None: training killed there and started again ends with the unbroken run's bits."""
    shutil.rmtree(out, ignore_errors=True)
    killed = killer.run("train_toys", str(out), {}, kill=point)
    if killed.code != KILLED:
        return f"it ended with {killed.code}: {killed.error}"
    again = killer.run("train_toys", str(out), {})
    if again.code:
        return again.error
    return None if same(again.value, unbroken) and again.value.keys() == unbroken.keys() else "other weights"


# ---------------------------------------------------------------- the campaign


@dataclass
class Row:
    """A line of tests/FAULTS.md."""

    fault: str
    made: str
    times: int
    outcome: str


def save_rows(killer: Killer, root: Path, limit: int) -> list[Row]:
    """Kills at every point of a save, failing disks at every operation, kills of a training, broken scoring passes."""
    every = points(killer, root)
    taken = random.Random(0).sample(every, min(limit, len(every))) if limit else every
    found = [kill_a_save(killer, root, number, when) for number, when, _ in taken]
    kinds = ", ".join(f"{count} at {name}" for name, count in sorted(Counter(name for *_, name in taken).items()))
    rows = [Row("1 killed in a save", f"SIGKILL before, halfway and after each operation: {kinds}", *_count(found))]
    operations = [number for number, when, _ in taken if when == "before"]
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
    found = [fail_a_save(killer, root, number, code) for code in codes for number in operations]
    rows.append(Row("3 disk full, quota, I/O error", "injected at each operation of a save", *_count(found)))
    unbroken = killer.run("train_toys", str(root / "unbroken"), {})
    assert unbroken.code == 0, unbroken.error
    draw, total = random.Random(1), len(unbroken.operations)
    spots = [(number, when) for number in range(1, total + 1) for when in ("before", "after")]
    spots = draw.sample(spots, min(len(spots), limit or 200))
    found = [kill_training(killer, root / "out", spot, unbroken.value) for spot in spots]
    made = f"SIGKILL at {len(spots)} points of a training with three saves ({total} operations), then started again"
    return [*rows, Row("1 training killed in a save, final weights compared", made, *_count(found))]


def _count(found: list[str | None]) -> tuple[int, str]:
    wrong = [problem for problem in found if problem]
    return len(found), "nothing lost" if not wrong else f"{len(wrong)} WRONG, the first: {wrong[0][-200:]}"


SUITES = {
    "1 whole two-rank jobs killed; 4 signals to ranks and agent": (
        "test_signals.py",
        "torchrun jobs: kill -9, SIGTERM, SIGINT",
    ),
    "1 scoring killed, 3 quota of the kernel": ("test_kills.py", "SIGKILL, RLIMIT_FSIZE"),
    "2 damaged checkpoints": ("test_checkpoint.py", "flipped, cut, zeroed, missing files"),
    "4 signals, 6 NaN and Inf on one rank, 7 spikes": (
        "test_interrupts.py",
        "in the forward and backward of one of two ranks",
    ),
    "8, 10 resumes": ("test_training.py", "other stages and settings, within and after an epoch"),
    "11 data": ("test_corpus.py", "files with each fault"),
    "12 prompts": ("test_prompts.py", "templates, lengths, special tokens"),
    "13 selections": ("test_selection.py", "ratios, ties, NaN, empty layers"),
    "14 model folders": ("test_hostile.py", "folders as a stranger could make them"),
    "15 environment": ("test_doctor.py", "wrong kernels, old libraries, little room"),
    "any: random input": ("test_fuzz.py", "hypothesis; `make fuzz` for longer"),
    "determinism": ("test_deterministic.py", "two runs compared"),
}


def suite_row(fault: str, file: str, made: str) -> Row:
    """One test file, run as a whole: how many of its tests passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "engine" / file)]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1:] or ["no output"]
    passed = done.stdout.split("[100%]")[0].count(".") if done.returncode == 0 else 0
    return Row(fault, f"{made} ({file})", passed, "as promised" if done.returncode == 0 else f"WRONG: {last[0][:200]}")


def table(rows: list[Row], how: str) -> str:
    about = f"Generated by `{how}`. Every fault is made for real, with real processes, signals and files."
    lines = ["# Faults that were made, and what happened", "", about]
    lines += ["", "| fault | how it was made | times | what happened |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {r.fault} | {r.made} | {r.times} | {r.outcome} |" for r in rows)]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Make every fault; write tests/FAULTS.md.")
    parser.add_argument("--points", type=int, default=0, help="points of a save and of a training (0: all, and 200)")
    parser.add_argument("--jobs", type=int, default=10, help="two-rank torchrun jobs to kill")
    parser.add_argument("--only-saves", action="store_true", help="leave the test files out")
    given = parser.parse_args()
    os.environ |= {"SLICETUNE_JOB_KILLS": str(given.jobs), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    killer = Killer()
    with tempfile.TemporaryDirectory() as folder:
        rows = save_rows(killer, Path(folder), given.points)
    killer.close()
    for fault, (file, made) in {} if given.only_saves else SUITES.items():
        rows.append(suite_row(fault, file, made))
        print(rows[-1], flush=True)
    text = table(rows, " ".join(["python tests/faults.py", *sys.argv[1:]]))
    (TESTS / "FAULTS.md").write_text(text)
    print(text)
    return int(any("WRONG" in row.outcome for row in rows))


if __name__ == "__main__":
    sys.exit(main())
