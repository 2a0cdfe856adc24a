"""Killed, full and limited disks, made for real: nothing is lost, and what goes on ends with the same bits.

`make faults` runs the same trials at every point; here a seeded sample, and scoring that resumes.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import socket
from pathlib import Path

import faults
import pytest
import torch
import toys
from fault_pool import KILLED, Killer, Trial

from slicetune.engine.common import checkpoint
from slicetune.engine.data import tiny

TRIALS = int(os.environ.get("SLICETUNE_KILLS", "12"))
LIMIT = 20_000
"""Bytes that a file may have: more than config.json and stages.json, less than what a stage is for."""


@pytest.fixture(scope="module")
def killer():
    process = Killer()
    yield process
    process.close()


@pytest.fixture(scope="module")
def killers(killer):
    """Of two ranks."""
    second = Killer()
    yield killer, second
    second.close()


def test_a_kill_at_any_point_of_a_save_loses_nothing(killer, tmp_path):
    """Every write, fsync, rename, mkdir and unlink of a save over an older one; before, halfway and after."""
    points = faults.points(killer, tmp_path)
    assert {"write", "fsync", "rename", "mkdir", "unlink", "rmdir"} <= {name for _, _, name in points}
    for number, when, name in random.Random(1).sample(points, 3 * TRIALS):
        problem = faults.kill_a_save(killer, tmp_path, number, when)
        assert problem is None, f"killed {when} operation {number} ({name}): {problem}"


def test_training_killed_in_a_save_ends_with_the_same_bits(killer, tmp_path):
    unbroken = killer.run("train_toys", str(tmp_path / "unbroken"), {})
    assert unbroken.code == 0, unbroken.error
    draw = random.Random(2)
    for _ in range(max(2, TRIALS // 4)):
        point = (draw.randint(1, len(unbroken.operations)), draw.choice(faults.MOMENTS))
        problem = faults.kill_training(killer, tmp_path / "out", point, unbroken.value)
        assert problem is None, f"{point}: {problem}"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_at_any_operation_leaves_the_old_ones(killer, tmp_path, code):
    operations = [number for number, when, name in faults.points(killer, tmp_path) if when == "before"]
    for number in random.Random(code).sample(operations, 4):
        problem = faults.fail_a_save(killer, tmp_path, number, code)
        assert problem is None, f"{errno.errorcode[code]} at operation {number}: {problem}"


def test_a_file_size_limit_of_the_kernel_is_one_line(killer, tmp_path):
    """No injection: the kernel refuses the write."""
    checkpoint.save(tmp_path / "step-1", {"a": torch.ones(3)}, {"step": 1})
    trial = killer.run("save_limited", str(tmp_path), 2, 20_000)
    assert trial.code == 1
    assert "UserError" in trial.error
    assert "File too large" in trial.error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1"]


@pytest.mark.skipif("SLICETUNE_JOB_KILLS" not in os.environ, reason="whole runs: `make faults` does")
def test_a_limit_in_any_stage_of_a_run_is_one_line_and_the_run_goes_on(killer, tmp_path):
    """Statistics, checkpoints, the model, the report: each run is whole up to a stage, which then meets the limit."""
    base, whole = str(tiny.model_dir("test")), tmp_path / "whole"
    code, said = killer.run("run_limited", base, str(whole), 0).value
    assert code == 0, said[-2000:]
    record = json.loads((whole / "stages.json").read_text())
    made = {"score": "statistics.safetensors", "train": "checkpoints", "export": "model", "evaluate": "report.html"}
    for stage, artefact in made.items():
        out, names = tmp_path / stage, list(record)
        shutil.copytree(whole, out)
        before = {name: record[name] for name in names[: names.index(stage) if stage in names else None]}
        (out / "stages.json").write_text(json.dumps(before))
        remove(out / artefact)
        trial = killer.run("run_limited", base, str(out), LIMIT)
        assert trial.code == 0, trial.error
        code, said = trial.value
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert (code, len(lines)) == (2, 1), said[-2000:]
        assert "make room" in lines[0]
        assert f"in the {stage} stage" in lines[0] or stage == "train", lines[0]  # a checkpoint is named itself
        assert "Traceback" not in said
        code, said = killer.run("run_limited", base, str(out), 0).value
        assert code == 0, said[-2000:]
        assert tensors(out / artefact) == tensors(whole / artefact)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def tensors(path: Path) -> list[bytes]:
    """What the safetensors files at or below a path hold."""
    return [file.read_bytes() for file in sorted([path, *path.rglob("*")]) if file.suffix == ".safetensors"]


def test_a_broken_scoring_pass_ends_with_the_same_bits(killer, tmp_path):
    """Killed after a batch, or within a save; counts and float64 sums equal those of a pass in one go."""
    whole = killer.run("score_toys", str(tmp_path / "whole"), 0)
    assert whole.code == 0, whole.error
    for kill in (None, (11, "half"), (len(whole.operations) // 2, "before")):
        out = tmp_path / "broken"
        assert killer.run("score_toys", str(out), 0 if kill else 3, kill=kill).code == -9
        again = killer.run("score_toys", str(out), 0)
        assert again.code == 0, again.error
        assert kill == (11, "half") or again.value["resumed at"] > 0
        assert again.value.pop("saved").keys() <= whole.value["saved"].keys()
        assert faults.same(again.value, whole.value)
        shutil.rmtree(out)


def scoring(
    killers, out: Path, world: int, struck: int = -1, point: tuple[int, str] | None = None, folder: str = ""
) -> list[Trial]:
    """A scoring pass of so many ranks, one of which is killed at a disk operation; with `folder`'s model in parts."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for rank, killer in enumerate(killers[:world]):
        killer.start("score_toys", str(out), 0, rank, world, port, folder, kill=point if rank == struck else None)
    return [killer.results.get(timeout=300) for killer in killers[:world]]


def test_two_ranks_of_which_one_is_killed_in_scoring_go_on_from_its_last_save(killers, tmp_path):
    """At any disk operation, of two ranks' saves and their pruning; gone on with by two ranks, or by one.

    Every other pass that is killed has the model in parts.
    """
    toys.model().save_pretrained(tmp_path / "model")
    whole = scoring(killers, tmp_path / "whole", 2)
    assert [trial.code for trial in whole] == [0, 0], whole[0].error + whole[1].error
    saved = [trial.value.pop("saved") for trial in whole]
    draw = random.Random(3)
    for number in range(max(4, TRIALS // 3)):
        struck, world, out = number % 2, 2 - number // 2 % 2, tmp_path / str(number)
        point = (draw.randint(1, len(whole[struck].operations)), draw.choice(faults.MOMENTS))
        folder = str(tmp_path / "model") if number % 4 in (0, 3) else ""
        assert scoring(killers, out, 2, struck, point, folder)[struck].code == KILLED
        again = scoring(killers, out, world)
        assert [trial.code for trial in again] == [0] * world, again[0].error
        before = [0, *(done for done, count in saved[struck].items() if count < point[0])]
        begun = [done for done in saved[struck] if done not in before][:1]  # may be whole already
        assert again[0].value["resumed at"] in (before[-1], *begun), point
        if world == 2:
            assert all(faults.same(a.value, b.value) for a, b in zip(again, whole, strict=True))
        else:
            for projection, counts in again[0].value["histogram"].items():
                parts = [trial.value["histogram"][projection] for trial in whole]
                assert all(torch.equal(counts[:, rank::2], part) for rank, part in enumerate(parts))
