"""What is saved is what was trained: in every way of saving, with any optimizer, and no forward after the last step."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import saved
import torch
import toys
from safetensors import safe_open
from torch import nn

from slicetune.engine import ffn, slices
from slicetune.engine.common.errors import UserError

kinds = pytest.mark.parametrize("kind", ["rows", "columns", "linears"])
optimizers = pytest.mark.parametrize("opt", ["torch", "ours", "sgd"])


def exact(live: nn.Module, what: Any) -> None:
    away, moved = saved.distance(live, what)
    assert away == 0.0
    assert moved > 0.01


def right(found: tuple[float, float, float]) -> None:
    """Of saved.two_ranks: what was saved is what lives, which is what one process trains."""
    away, moved, apart = found
    assert away == 0.0
    assert moved > 0.01
    assert apart < 1e-5 * moved


def trained(kind: str, opt: str) -> nn.Module:
    model, params = saved.sliced(kind)
    saved.steps(model, saved.optimizer(opt, params))
    return model


def by_save_pretrained(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def by_merging(model: nn.Module, folder: Path) -> Path:
    return by_save_pretrained(slices.merge(copy.deepcopy(model)), folder)


def by_ours(model: nn.Module, folder: Path) -> Path:
    ffn.save(model, folder)
    return folder


def by_state_dict(model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    torch.save(model.state_dict(), folder)
    return torch.load(folder)


@kinds
@optimizers
@pytest.mark.parametrize("way", [by_save_pretrained, by_merging, by_ours, by_state_dict])
def test_in_a_loop_of_ones_own(way: Callable, kind, opt, tmp_path):
    model = trained(kind, opt)
    exact(model, way(model, tmp_path / "saved"))


def trainer(kind: str, opt: str, out: Path, **settings: Any) -> Any:
    """Hugging Face's, on the toy: the same update again and again, a checkpoint each."""
    from transformers import Trainer, TrainingArguments

    model, params = saved.sliced(kind)
    settings = {"max_steps": saved.STEPS, "save_steps": 1, "per_device_train_batch_size": 4} | settings
    arguments = TrainingArguments(str(out), use_cpu=True, report_to=[], disable_tqdm=True, **settings)
    data = [{"input_ids": row, "labels": row} for row in saved.batch()]
    chosen = (saved.optimizer(opt, params), None)
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data, optimizers=chosen)


@kinds
@pytest.mark.parametrize("opt", ["torch", "ours"])
def test_hugging_face_trainer(kind, opt, tmp_path):
    own = trainer(kind, opt, tmp_path / "run")
    own.train()
    own.save_model(str(tmp_path / "saved"))
    exact(own.model, tmp_path / "saved")
    exact(own.model, tmp_path / "run" / f"checkpoint-{saved.STEPS}")


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_hugging_face_trainer_resumes(kind, tmp_path):
    whole, broken, rest = (trainer(kind, "ours", tmp_path / name) for name in ("a", "b", "b"))
    whole.train()
    broken.train()
    for step in range(2, saved.STEPS + 1):
        shutil.rmtree(tmp_path / "b" / f"checkpoint-{step}")
    rest.train(resume_from_checkpoint=True)
    assert rest.state.global_step == saved.STEPS
    own = rest.model.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in whole.model.state_dict().items())


def test_hugging_face_trainer_takes_the_best(tmp_path):
    """The largest loss is the best here: that of the first update."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    own = trainer("rows", "torch", tmp_path, eval_strategy="steps", eval_steps=1, **best)
    own.train()
    assert own.state.best_model_checkpoint.endswith("checkpoint-1")
    exact(own.model, tmp_path / "checkpoint-1")
    assert saved.distance(own.model, tmp_path / "checkpoint-2")[0] > 0


@kinds
@pytest.mark.parametrize("opt", ["torch", "ours"])
def test_accelerate(kind, opt, tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, params = saved.sliced(kind)
    wrapped, optimizer = accelerator.prepare(model, saved.optimizer(opt, params))
    saved.steps(wrapped, optimizer, accelerator.backward)
    given = {name: tensor.clone() for name, tensor in accelerator.get_state_dict(wrapped).items()}
    accelerator.save_model(wrapped, tmp_path / "saved")
    accelerator.save_state(tmp_path / "state")
    ffn.save(wrapped, tmp_path / "plain")
    model.config.save_pretrained(tmp_path / "saved")
    for what in (given, tmp_path / "saved", tmp_path / "plain"):
        exact(model, what)
    after = copy.deepcopy(model.state_dict())
    saved.steps(wrapped, optimizer, accelerator.backward)
    accelerator.load_state(tmp_path / "state")
    assert all(torch.equal(tensor, after[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "opt"), [("rows", "ours"), ("columns", "ours"), ("linears", "ours"), ("rows", "torch")]
)
@pytest.mark.parametrize("how", ["full", "dcp", "save"])
def test_fsdp2(pool, how, kind, opt, tmp_path):
    right(pool.run("two_ranks", f"fsdp2.{how}", kind, opt, str(tmp_path / "saved"))[0])


@kinds
@pytest.mark.parametrize(
    "how", ["zero1.module", "zero2.checkpoint", "zero3.checkpoint", "zero3.weights", "early3.save"]
)
def test_deepspeed(pool, how, kind, tmp_path):
    right(pool.run("two_ranks", how, kind, "ours", str(tmp_path / "saved"))[0])


@pytest.mark.parametrize("how", ["zero2.weights", "zero3.weights"])
def test_deepspeed_with_an_optimizer_of_torch(pool, how, tmp_path):
    right(pool.run("two_ranks", how, "columns", "torch", str(tmp_path / "saved"))[0])


def test_saving_disturbs_no_backward():
    """A weight is written as it was read: the graph of a forward before is still to run."""
    model, params = saved.sliced("rows")
    loss = saved.loss(model)
    model.state_dict()
    loss.backward()
    assert all(p.grad is not None for p in params)


def test_a_low_precision_model_is_saved_in_its_precision(tmp_path):
    model, params = saved.sliced("rows", torch.bfloat16)
    saved.steps(model, saved.optimizer("ours", params))
    ffn.save(model, tmp_path)
    loaded = saved.loaded(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in slices.merge(model).state_dict().items())
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode


def test_ours_has_no_key_of_its_own(tmp_path):
    ffn.save(trained("columns", "ours"), tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == toys.model().state_dict().keys()


@pytest.mark.parametrize("how", ["checkpointed", "compiled"])
def test_ours_has_the_plain_names_whatever_wraps_a_layer(how, tmp_path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, params = saved.sliced("rows")
    for i, layer in enumerate(model.model.layers):
        wrapped = checkpoint_wrapper(layer) if how == "checkpointed" else torch.compile(layer, backend="eager")
        model.model.layers[i] = wrapped
    saved.steps(model, saved.optimizer("torch", params))
    ffn.save(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == toys.model().state_dict().keys()
    exact(model, tmp_path)


def test_an_earlier_save_leaves_nothing_behind(tmp_path):
    """transformers loads model.safetensors before an index, other programs the index first."""
    model = trained("rows", "ours")
    toys.model(seed=3).save_pretrained(tmp_path, max_shard_size="10KB")
    ffn.save(model, tmp_path)
    assert sorted(file.name for file in tmp_path.glob("*safetensors*")) == ["model.safetensors"]
    model.save_pretrained = partial(model.save_pretrained, max_shard_size="10KB")
    ffn.save(model, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    exact(model, tmp_path)


def test_what_cannot_be_saved_is_refused(tmp_path):
    with pytest.raises(UserError, match="Linear has no save_pretrained"):
        ffn.save(nn.Linear(2, 2), "nowhere")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="file is a file: name a folder"):
        ffn.save(trained("rows", "ours"), file)
    flat = type("FullyShardedDataParallel", (nn.Sequential,), {})
    with pytest.raises(UserError, match="FSDP1 cuts weights into flat parts: use FSDP2"):
        ffn.save(flat(toys.model()), "nowhere")


def test_fsdp2_shards_a_model_before_its_values_are_there(pool):
    assert pool.run("sharded_without_values") == [0.0, 0.0]
