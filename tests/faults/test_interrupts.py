"""Signals and numbers that are not finite, on one rank of two: both ranks agree, and nothing is lost or changed."""

from __future__ import annotations

import json
import math
import signal

import faults
import pytest
import torch

from slicetune.engine.common import checkpoint
from slicetune.engine.common.errors import Exit, UserError
from slicetune.engine.training.guard import SpikeWatch, warn_of_spike


def trained(out) -> dict[str, torch.Tensor]:
    return checkpoint.load(checkpoint.newest(out / "checkpoints")[0])[0]


@pytest.fixture(scope="module")
def unbroken(pool, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    pool.run("train_slices", str(out), {"train_eval_steps": 3})
    return out


@pytest.mark.parametrize(("number", "step", "stage"), [(signal.SIGTERM, 2, 1), (signal.SIGINT, 3, 3)])
def test_a_signal_to_one_rank_saves_the_step_of_all(pool, unbroken, tmp_path, number, step, stage):
    """Two signals, the second before the save. Step 3 is due for a dev loss, which is made up for after the resume."""
    settings = {"zero_stage": stage, "train_eval_steps": 3}
    ends = pool.run("train_signalled", str(tmp_path), settings, int(number), step)
    assert ends[0] == ends[1]
    code, message, left = ends[0]
    assert code == Exit.INTERRUPTED
    assert f"step {step} of 10" in message
    assert left == [f"step-{step}"]
    resumed = pool.run("train_slices", str(tmp_path), settings)[0]
    assert faults.same(resumed, trained(unbroken))

    def dev(out):
        rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        return {row["step"]: row["dev_loss"] for row in rows if "dev_loss" in row}

    assert dev(tmp_path) == dev(unbroken)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("where", "value"), [("loss", math.nan), ("gradient", math.nan), ("gradient", math.inf)])
def test_not_finite_on_one_rank_stops_both_before_the_step(pool, unbroken, tmp_path, stage, where, value):
    settings = {"zero_stage": stage, "train_save_steps": 1, "train_save_total_limit": 20}
    ends = pool.run("train_poisoned", str(tmp_path), settings, value, 4, where)
    assert ends[0] == ends[1]
    code, message, left = ends[0]
    assert code == Exit.WRONG
    assert f"step 4: not finite: {where} of rank 1, sentences toy/train/" in message
    assert left == ["step-1", "step-2", "step-3"]
    if stage == 1 and where == "gradient" and math.isnan(value):
        resumed = pool.run("train_slices", str(tmp_path), {"zero_stage": stage})[0]
        assert faults.same(resumed, trained(unbroken))


def test_a_bf16_gradient_that_overflows_stops_too(pool, tmp_path):
    settings = {"model_dtype": "bfloat16", "train_save_steps": 1}
    code, message, left = pool.run("train_poisoned", str(tmp_path), settings, math.inf, 2, "gradient")[0]
    assert code == Exit.WRONG
    assert "gradient of rank 1" in message
    assert left == ["step-1"]


def test_a_signal_while_scoring_saves_both_ranks_shares(pool, tmp_path):
    whole = pool.run("score_signalled", str(tmp_path / "whole"), 0, 0)
    broken = pool.run("score_signalled", str(tmp_path / "broken"), int(signal.SIGTERM), 4)
    assert [end[0] for end in broken] == [Exit.INTERRUPTED] * 2
    assert "scoring" in broken[0][1]
    again = pool.run("score_signalled", str(tmp_path / "broken"), 0, 0)
    for rank in (0, 1):
        assert again[rank][0] == Exit.COMPLETE
        assert again[rank][2].pop("done") == 4
        assert faults.same(again[rank][2], whole[rank][2])


def test_a_loss_spike_is_said_once_and_does_not_move_the_mean(capsys):
    watch = SpikeWatch()
    for step in range(30):
        warn_of_spike(watch, 2.0 + 0.1 * (step % 3), step, 1e-3, ["it/train/1"], stop=False)
    assert "warning" not in capsys.readouterr().out
    warn_of_spike(watch, 9.0, 30, 1e-3, ["it/train/7", "law/train/2"], stop=False)
    assert "step 30: loss 9.000 after a mean of 2.1" in (said := capsys.readouterr().out)
    assert "it/train/7 law/train/2" in said
    assert 2.0 < watch.mean < 2.2
    with pytest.raises(UserError, match=r"stopped by --train\.loss-spike stop"):
        warn_of_spike(watch, 9.0, 31, 1e-3, ["it/train/7"], stop=True)


def test_a_spike_stops_both_ranks_before_it_is_saved(pool, tmp_path):
    """In the 15th of 20 updates rank 1's logits are a hundred times as large."""
    settings = {"train_epochs": 4, "train_save_steps": 1, "train_eval_steps": 100, "train_loss_spike": "stop"}
    ends = pool.run("train_poisoned", str(tmp_path), settings, 100.0, 15, "loss")
    assert ends[0] == ends[1]
    code, message, left = ends[0]
    assert code == Exit.WRONG
    assert "step 15: loss" in message
    assert "stopped by --train.loss-spike stop" in message
    assert left == ["step-13", "step-14"]


def test_noise_and_a_falling_loss_are_no_spikes():
    watch, draw = SpikeWatch(), torch.Generator().manual_seed(0)
    losses = [5 * 0.99**i + 0.3 * float(torch.randn((), generator=draw)) for i in range(300)]
    assert not any(watch.see(loss) for loss in losses)
