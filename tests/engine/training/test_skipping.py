"""`--train.non-finite skip`: an update with a NaN on one rank is left out, by all ranks, and changes nothing."""

from __future__ import annotations

import json
import math
import shutil

import faults
import pytest
import torch
import toys

from slicetune.engine.common import checkpoint
from slicetune.engine.common.errors import Exit, UserError
from slicetune.engine.data.batching import pack
from slicetune.engine.training.guard import MOST_SKIPPED, FiniteWatch, check_skipped

SKIP = {"train_non_finite": "skip", "train_save_steps": 1, "train_save_total_limit": 20, "train_eval_steps": 100}


def saved(out, step):
    return checkpoint.load(out / "checkpoints" / f"step-{step}")


@pytest.fixture(scope="module")
def skipped(pool, tmp_path_factory):
    """Update 4 of 10 was left out, at every stage: {stage: folder}. Its NaN is in the loss, or in a gradient alone."""
    runs = {}
    for stage, where in ((1, "loss"), (2, "gradient"), (3, "gradient")):
        runs[stage] = tmp_path_factory.mktemp(f"skipped{stage}")
        ends = pool.run("train_poisoned", str(runs[stage]), SKIP | {"zero_stage": stage}, math.nan, 4, where)
        assert [code for code, *_ in ends] == [Exit.COMPLETE] * 2
    return runs


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_no_weight_and_no_state_changes(skipped, stage):
    assert faults.same(saved(skipped[stage], 4)[0], saved(skipped[stage], 3)[0])
    assert not faults.same(saved(skipped[stage], 5)[0], saved(skipped[stage], 4)[0])
    assert faults.same(saved(skipped[stage], 10)[0], saved(skipped[1], 10)[0])


def test_the_other_updates_are_those_of_plain_torch(skipped):
    """Moments and bias correction too: neither saw the update that was left out."""
    tensors, _ = saved(skipped[1], 10)
    for name, value in toys.trained_by_hand(left_out=[4]).items():
        assert (tensors[f"master/{name}"].double() - value).norm() / value.norm() < 1e-5


@pytest.mark.parametrize(("stage", "last"), [(1, 4), (2, 6), (3, 4)])
def test_a_resume_after_it_ends_with_the_same_bits(pool, skipped, tmp_path, stage, last):
    """From the skipped step itself, and from one after it: the count of past updates is not that of steps."""
    shutil.copytree(skipped[stage] / "checkpoints" / f"step-{last}", tmp_path / "checkpoints" / f"step-{last}")
    resumed = pool.run("train_slices", str(tmp_path), SKIP | {"zero_stage": stage})[0]
    assert faults.same(resumed, saved(skipped[1], 10)[0])
    state = saved(tmp_path, 10)[1]
    assert state["skipped"] == [4]
    assert set(state["group_steps"].values()) == {9}


def test_it_is_counted_in_every_later_row(skipped):
    for out in skipped.values():
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        by_step = {row["step"]: row for row in rows if "lr" in row}
        assert by_step[4]["loss"] is None
        assert [by_step[step]["skipped_steps"] for step in (3, 4, 10)] == [0, 1, 1]
        assert all(math.isfinite(row["loss"]) for step, row in by_step.items() if step != 4)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_update_with_accumulation_and_clipping(pool, tmp_path, stage, dtype):
    """In the second of three micro-batches of the first update, before there are moments."""
    settings = SKIP | {"zero_stage": stage, "model_dtype": dtype, "train_micro_batch_size": 1}
    settings |= {"train_max_grad_norm": 0.5, "train_max_steps": 2}
    pool.run("train_poisoned", str(tmp_path), settings, math.inf, 2, "gradient")
    (first, state), (second, _) = saved(tmp_path, 1), saved(tmp_path, 2)
    assert state["skipped"] == [1]
    for name, value in first.items():
        assert name.startswith("master/") or not value.any()
        assert not second[name].isnan().any()
    assert not faults.same(first, second)


def test_it_is_said_with_its_sentences(capsys):
    watch, batch = FiniteWatch([], skip=True), pack(toys.examples(2))
    assert watch.check(torch.tensor(1.5), batch, step=3) == 1.5
    assert capsys.readouterr().out == ""
    assert watch.check(torch.tensor(math.inf), batch, step=3) is None
    said = capsys.readouterr().out
    assert "step 4: not finite: loss of rank 0, sentences toy/train/0 toy/train/1; no weight" in said
    assert "the update is skipped" in said


def test_ten_in_a_row_stop():
    check_skipped([3, *range(5, 4 + MOST_SKIPPED), 5 + MOST_SKIPPED])
    with pytest.raises(UserError, match=f"steps 5 to {4 + MOST_SKIPPED} were all skipped"):
        check_skipped([3, *range(5, 5 + MOST_SKIPPED)])
