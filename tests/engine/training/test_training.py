"""The loop under real DeepSpeed on two real ranks: stages agree to the bit, resumes equal unbroken runs."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import toys
from rank_pool import Pool

from slicetune.engine.common import checkpoint
from slicetune.engine.slices.ffn import attach
from slicetune.engine.training.config import TrainConfig
from slicetune.engine.training.order import Order
from slicetune.engine.training.plan import Plan, learning_rate

STAGES = (1, 2, 3)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def unbroken(pool, tmp_path_factory):
    """Ten steps on two ranks at every stage: {stage: (folder, tensors)}."""
    runs = {}
    for stage in STAGES:
        out = tmp_path_factory.mktemp(f"stage{stage}")
        runs[stage] = out, pool.run("train_slices", str(out), {"zero_stage": stage})[0]
    return runs


def test_stages_agree_bit_for_bit(unbroken):
    assert equal(unbroken[1][1], unbroken[2][1])
    assert equal(unbroken[1][1], unbroken[3][1])


def test_training_changed_every_slice(unbroken):
    model = toys.model()
    attach(model, toys.neurons())
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert not torch.equal(unbroken[1][1][f"master/{name}"], p.detach())


def test_equals_plain_torch_in_float64(unbroken):
    """The same sentences, loss and optimizer written out by hand: dense gradients, whole model in float64."""
    for name, value in toys.trained_by_hand().items():
        assert (unbroken[1][1][f"master/{name}"].double() - value).norm() / value.norm() < 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_resume_equals_unbroken(pool, unbroken, tmp_path, stage):
    settings = {"zero_stage": stage, "train_save_steps": 3}
    pool.run("train_slices", str(tmp_path), settings | {"train_max_steps": 6})
    shutil.rmtree(tmp_path / "checkpoints" / "step-6")  # go on from within an epoch
    resumed = pool.run("train_slices", str(tmp_path), settings)[0]
    assert equal(resumed, unbroken[stage][1])
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 10


def test_resume_at_another_stage(pool, unbroken, tmp_path):
    pool.run("train_slices", str(tmp_path), {"zero_stage": 1, "train_max_steps": 5})
    resumed = pool.run("train_slices", str(tmp_path), {"zero_stage": 3})[0]
    assert equal(resumed, unbroken[1][1])


def test_accumulation_and_clipping_stay_within_rounding(pool, tmp_path):
    """With both on, the order of sums differs between stages: 1e-5 relative on the fp32 masters."""
    runs = {}
    for stage in STAGES:
        settings = {"zero_stage": stage, "train_micro_batch_size": 1, "train_max_grad_norm": 0.5}
        runs[stage] = pool.run("train_slices", str(tmp_path / str(stage)), settings)[0]
    names = [name for name in runs[1] if name.startswith("master/")]
    assert len(names) == 5  # the slices of toys.neurons()
    for stage in (2, 3):
        for name in names:
            assert (runs[1][name] - runs[stage][name]).norm() <= 1e-5 * runs[1][name].norm()


def test_accumulation_equals_one_batch(pool, unbroken, tmp_path):
    split = pool.run("train_slices", str(tmp_path), {"train_micro_batch_size": 1})[0]
    names = [name for name in split if name.startswith("master/")]
    assert len(names) == 5
    for name in names:
        assert (split[name] - unbroken[1][1][name]).norm() <= 1e-5 * split[name].norm()


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_keeps_fp32_masters_and_resumes(pool, tmp_path, stage):
    """At lr 1e-5 a bf16 weight of 0.1 would never move: the master does. Resume must restore master and copy."""
    settings = {"zero_stage": stage, "model_dtype": "bfloat16", "train_learning_rate": 1e-5, "train_save_steps": 4}
    whole = pool.run("train_slices", str(tmp_path / "whole"), settings)[0]
    pool.run("train_slices", str(tmp_path / "broken"), settings | {"train_max_steps": 4})
    resumed = pool.run("train_slices", str(tmp_path / "broken"), settings)[0]
    assert equal(whole, resumed)
    model = toys.model(dtype=torch.bfloat16)
    attach(model, toys.neurons())
    for name, p in model.named_parameters():
        if p.requires_grad:
            moved = (whole[f"master/{name}"] - p.detach().float()).abs()
            assert 0 < moved.max() < 2e-4


def test_stages_agree_in_bf16(pool, tmp_path):
    runs = [
        pool.run("train_slices", str(tmp_path / str(s)), {"zero_stage": s, "model_dtype": "bfloat16"})[0]
        for s in STAGES
    ]
    assert equal(runs[0], runs[1])
    assert equal(runs[0], runs[2])


def test_activation_checkpointing_changes_no_bit(pool, unbroken, tmp_path):
    again = pool.run("train_slices", str(tmp_path), {"zero_stage": 1, "model_activation_checkpointing": True})[0]
    assert equal(again, unbroken[1][1])


def test_one_rank_reads_the_same_order():
    """Two ranks resume as one: an update's sentences do not depend on the number of ranks."""
    order = Order(0, 23, 5)
    epoch = [order.update(1, step) for step in range(order.updates_per_epoch)]
    assert sorted(i for update in epoch for i in update) == list(range(23))
    for world in (1, 2, 3):
        plan = Plan.of(TrainConfig(), 23, world)
        assert plan.updates_per_epoch == 5
        assert plan.micro_batch * plan.accumulation * world >= 5


def test_two_ranks_resume_as_one(pool, unbroken, tmp_path):
    """The same sentences in the same updates: losses and masters of the unbroken run, to rounding."""
    pool.run("train_slices", str(tmp_path), {"train_max_steps": 5})
    alone = Pool(world=1)
    try:
        resumed = alone.run("train_slices", str(tmp_path), {})[0]
    finally:
        alone.close()
    for name, value in unbroken[1][1].items():
        assert (resumed[name] - value).norm() <= 1e-5 * value.norm(), name
    losses = [
        [row["loss"] for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
        for out in (unbroken[1][0], tmp_path)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_resume_of_another_run_is_refused(pool, unbroken, tmp_path):
    shutil.copytree(unbroken[1][0] / "checkpoints", tmp_path / "checkpoints")
    folder, _ = checkpoint.newest(tmp_path / "checkpoints")
    state = json.loads((folder / "state.json").read_text())
    tensors, _ = checkpoint.load(folder)
    checkpoint.save(folder, tensors, state | {"identity": {"toy": 2}})
    with pytest.raises(AssertionError, match="belongs to another run"):
        pool.run("train_slices", str(tmp_path), {})


def test_schedules():
    config = TrainConfig(learning_rate=1.0, lr_scheduler="linear", warmup_steps=2)
    rates = [learning_rate(config, step, 6) for step in range(6)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])
    config.lr_scheduler = "cosine"
    assert [learning_rate(config, step, 6) for step in range(2, 6)] == pytest.approx([1.0, 0.85355339, 0.5, 0.14644661])
