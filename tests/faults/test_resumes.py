"""Resumes: a named, a damaged, another run's checkpoint; at an epoch's end, after the last step, on other ranks."""

from __future__ import annotations

import json
import shutil

import faults
import pytest
from rank_pool import Pool

from slicetune.engine.common import checkpoint
from slicetune.engine.common.errors import UserError
from slicetune.engine.models import load as models
from slicetune.engine.run import train
from slicetune.engine.run.stages import Stages

KEEP = {"train_save_steps": 1, "train_save_total_limit": 20}


@pytest.fixture(scope="module")
def whole(pool, tmp_path_factory):
    """Ten updates in two epochs, with a checkpoint after each."""
    out = tmp_path_factory.mktemp("whole")
    pool.run("train_slices", str(out), KEEP)
    return out


@pytest.fixture
def out(whole, tmp_path):
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    shutil.copy(whole / "metrics.jsonl", tmp_path)
    return tmp_path


def saved(out, step=10):
    return checkpoint.load(out / "checkpoints" / f"step-{step}")


def only(out, *steps: int) -> None:
    for folder in (out / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) not in steps:
            shutil.rmtree(folder)


def refused(pool, out, settings, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        pool.run("train_slices", str(out), settings)


@pytest.mark.parametrize("step", [5, 7])
def test_a_named_checkpoint_at_an_epochs_end_and_within_one(pool, whole, out, step):
    """Newer ones are there; what is saved anew is not taken for an old one."""
    again = pool.run("train_slices", str(out), KEEP | {"resume": str(out / "checkpoints" / f"step-{step}")})[0]
    assert faults.same(again, saved(whole)[0])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "lr" in row] == list(range(1, 11))


def test_what_a_resume_saves_is_kept_beside_newer_ones(pool, out):
    settings = {"train_save_steps": 1, "train_save_total_limit": 2, "train_max_steps": 4}
    pool.run("train_slices", str(out), settings | {"resume": str(out / "checkpoints" / "step-3")})
    assert (out / "checkpoints" / "step-4").is_dir()


def test_after_the_last_step_nothing_is_done(pool, whole, out):
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    assert faults.same(pool.run("train_slices", str(out), KEEP)[0], saved(whole)[0])
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == before


def test_a_damaged_one_is_passed_over_unless_it_was_named(pool, whole, out):
    weights = out / "checkpoints" / "step-10" / "state.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    refused(pool, out, KEEP | {"resume": str(weights.parent)}, rf"{weights}: its content changed")
    assert faults.same(pool.run("train_slices", str(out), KEEP)[0], saved(whole)[0])


@pytest.mark.parametrize("resume", ["auto", "step-10"])
def test_another_runs_checkpoint_is_refused_with_a_table(pool, out, resume):
    tensors, state = saved(out)
    checkpoint.save(out / "checkpoints" / "step-10", tensors, state | {"identity": {"toy": 2, "train": {"epochs": 3}}})
    chosen = resume if resume == "auto" else str(out / "checkpoints" / resume)
    refused(pool, out, {"resume": chosen}, r"belongs to another run \(toy: 2 → 1; train: \{'epochs': 3\} → None\)")


def test_state_is_matched_by_name(pool, whole, out):
    """The other order of names is the same state; a missing name or another shape is refused."""
    tensors, state = saved(out, 6)
    only(out, 6)
    folder = out / "checkpoints" / "step-6"
    checkpoint.save(folder, dict(reversed(tensors.items())), state)
    assert faults.same(pool.run("train_slices", str(out), KEEP)[0], saved(whole)[0])
    name = next(name for name in tensors if name.startswith("exp_avg/"))
    for changed, says in ((None, r"None → \("), (tensors[name][:, 1:].contiguous(), r"31\) → \(\d+, 32\)")):
        only(out, 6)
        rest = {n: t for n, t in tensors.items() if n != name} | ({} if changed is None else {name: changed})
        checkpoint.save(folder, rest, state)
        refused(pool, out, KEEP, rf"holds other tensors than are trained \({name}: .*{says}")


def test_one_of_before_there_were_update_groups(pool, whole, out):
    """All its parameters took part in every update, so their steps are the checkpoint's."""
    tensors, state = saved(out, 6)
    only(out, 6)
    del state["group_steps"]
    checkpoint.save(out / "checkpoints" / "step-6", tensors, state)
    assert faults.same(pool.run("train_slices", str(out), KEEP)[0], saved(whole)[0])
    assert saved(out)[1]["group_steps"] == {"every update": 10}


def test_another_micro_batch_is_the_same_updates(pool, whole, out):
    """Saved with updates of one micro-batch, gone on with three: the same order and, to rounding, the same weights."""
    only(out, 5)
    split = pool.run("train_slices", str(out), KEEP | {"train_micro_batch_size": 1})[0]
    for name, value in saved(whole)[0].items():
        assert (split[name] - value).norm() <= 1e-5 * value.norm(), name


def test_one_rank_goes_on_as_two_and_a_rank_without_a_sentence_adds_nothing(pool, tmp_path):
    """A global batch of one sentence: the second rank always runs a sentence of weight zero."""
    settings = KEEP | {"train_global_batch_size": 1, "data_train_sentences": 7, "train_eval_steps": 100}
    alone = Pool(world=1)
    try:
        unbroken = alone.run("train_slices", str(tmp_path / "one"), settings)[0]
    finally:
        alone.close()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    only(tmp_path / "two", 5)
    resumed = pool.run("train_slices", str(tmp_path / "two"), settings)[0]
    for name, value in unbroken.items():
        assert (resumed[name] - value).norm() <= 1e-5 * value.norm(), name


def test_another_model_and_another_tokenizer_have_another_fingerprint(tmp_path):
    """What a run's settings say of its model: the same shapes with other weights are another one."""
    import toys

    toys.model().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    before = models.fingerprint(tmp_path)
    assert models.fingerprint(tmp_path) == before
    (tmp_path / "tokenizer.json").write_text("{ }")
    second = models.fingerprint(tmp_path)
    toys.model(seed=1).save_pretrained(tmp_path)
    assert len({before, second, models.fingerprint(tmp_path)}) == 3


def test_a_sweep_has_no_one_checkpoint_to_name(tmp_path):
    import toys

    config = toys.config(str(tmp_path), train_sweep=(1e-3, 1e-2), resume="checkpoints/step-1")
    with pytest.raises(UserError, match=r"--resume checkpoints/step-1: a sweep has"):
        train.check(config)


def test_a_changed_setting_of_a_finished_stage_is_a_table(tmp_path):
    (tmp_path / "artefact").touch()
    stages = Stages(tmp_path)
    stages.do("x", {"train": {"lr": 1, "words": "a" * 300}, "many": dict.fromkeys("abcdefghij", 0)}, tmp_path, dict)
    changed = {"train": {"lr": 2, "words": "b" * 300}, "many": dict.fromkeys("abcdefghij", 1)}
    with pytest.raises(UserError, match=r"many\.a: 0 → 1; .*; and 4 more") as caught:
        Stages(tmp_path).do("x", changed, tmp_path, dict)
    assert len(str(caught.value)) < 1000
