"""A run fits itself: what `auto` takes on a GPU, what the dry run names, what reaches the stages."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import toys
from eight_b import GIGA, LLAMA8, LLAMA70, config
from safetensors.torch import load_file

from slicetune.engine.common import distributed
from slicetune.engine.common.command import parse
from slicetune.engine.common.errors import UserError, describe
from slicetune.engine.common.settings import as_dict
from slicetune.engine.data.config import DataConfig
from slicetune.engine.evaluation.config import EvaluateConfig
from slicetune.engine.methods.base import Full
from slicetune.engine.methods.landermt.settings import Landermt
from slicetune.engine.methods.lora import Lora
from slicetune.engine.models import load
from slicetune.engine.models.config import ModelConfig
from slicetune.engine.run.config import RunConfig
from slicetune.engine.run.forecast import memory
from slicetune.engine.run.forecast.partition import partition
from slicetune.engine.run.forecast.settle import for_scoring, scoring_ways, settle
from slicetune.engine.run.forecast.useless import useless
from slicetune.engine.run.job import Job
from slicetune.engine.run.run import Run, run_one
from slicetune.engine.scoring.config import ScoreConfig
from slicetune.engine.slices.neurons import NeuronSet
from slicetune.engine.training.config import TrainConfig


def taken(run: RunConfig, gigabytes: float, world: int = 1) -> tuple:
    """Tokens, checkpointing and counts of scoring; checkpointing of training; whether each fits."""
    found = settle(run, LLAMA8, world, int(gigabytes * GIGA))
    score, train = found.scoring.config, found.training.config
    how = score.score.tokens_per_batch, score.model.activation_checkpointing, score.score.counts
    return how, train.model.activation_checkpointing, (found.scoring.fits, found.training.fits)


BOTH, NEITHER = (True, True), (False, False)


@pytest.mark.parametrize(
    ("kind", "gigabytes", "scoring", "training", "fits"),
    [
        ("none", 80, (4096, "off", "device"), "off", BOTH),
        ("none", 24, (1024, "off", "host"), "on", BOTH),
        ("none", 16, (1024, "on", "host"), "on", NEITHER),
        ("nf4", 24, (2048, "off", "device"), "off", BOTH),
        ("nf4", 16, (1024, "off", "device"), "on", BOTH),
        ("nf4", 12, (1024, "off", "host"), "on", BOTH),
        ("nf4", 8, (2048, "on", "host"), "on", (True, False)),
        ("int8", 12, (2048, "on", "host"), "on", (True, False)),
        ("int8", 16, (1024, "off", "host"), "on", BOTH),
    ],
)
def test_what_an_8b_takes(kind, gigabytes, scoring, training, fits):
    got = taken(config(kind), gigabytes)
    assert got[1:] == (training, fits)
    assert got[0] == scoring or not fits[0]


@pytest.mark.parametrize("gigabytes", [9, 12, 16, 20, 24, 28, 40, 80])
def test_it_is_the_first_that_fits(gigabytes):
    """By a walk through all ways here, with the arithmetic of the whole tables."""
    run = config("nf4")
    found = settle(run, LLAMA8, 1, gigabytes * GIGA)
    sizes = [(memory.device_total(memory.scoring(way, LLAMA8, 1)), way) for way in scoring_ways(run)]
    first = next(way for size, way in sizes if size <= 0.95 * gigabytes * GIGA)
    assert (found.scoring.config, found.scoring.fits) == (first, True)
    assert found.scoring.bytes == memory.device_total(memory.scoring(found.scoring.config, LLAMA8, 1))


def test_the_order():
    """Device before host, large batches before checkpointing, checkpointing before batches that fill no GPU."""
    ways = [(w.score.tokens_per_batch, w.model.checkpoints, w.score.counts) for w in scoring_ways(config(length=256))]
    assert len(set(ways)) == len(ways) == 5 * 2 * 2
    assert ways[:7] == [
        *((size, False, place) for place in ("device", "host") for size in (4096, 2048, 1024)),
        (4096, True, "device"),
    ]
    assert ways[-1] == (256, True, "host")
    cut = scoring_ways(config(model=ModelConfig(partition="on")))
    assert [(w.score.tokens_per_batch, w.model.checkpoints) for w in cut[:4]] == [
        (4096, False),
        (4096, False),
        (4096, True),
        (4096, True),
    ]
    assert {w.score.tokens_per_batch for w in scoring_ways(config(length=9000))} == {4096}
    assert {w.score.counts for w in scoring_ways(config(method=Landermt()))} == {"device"}


def test_without_a_gpu_nothing_changes():
    found = settle(config(), LLAMA8, 2, None)
    for stage in found.stages:
        assert stage.config.score.tokens_per_batch == 4096
        assert not stage.config.model.checkpoints
    on_host = settle(config(score=ScoreConfig(counts="host")), LLAMA8, 2, None)
    assert on_host.scoring.config.score.counts == "host"
    assert ScoreConfig().batch_tokens == 4096
    assert not ModelConfig().checkpoints


def test_what_a_user_sets_is_kept():
    score = ScoreConfig(tokens_per_batch=3000, counts="device")
    model = ModelConfig(activation_checkpointing="off", partition="off")
    for gigabytes in (8, 24, 80):
        assert taken(config(model=model, score=score), gigabytes)[:2] == ((3000, "off", "device"), "off")
    on = ModelConfig(activation_checkpointing="on", partition="off")
    assert taken(config(model=on), 80)[:2] == ((4096, "on", "device"), "on")
    small = config(score=ScoreConfig(tokens_per_batch=700))
    assert taken(small, 24)[0][0] == 700
    assert settle(small, LLAMA8, 1, 24 * GIGA).training.config.score.tokens_per_batch == 700  # the dev loss


def test_a_method_has_the_stages_that_it_has():
    assert settle(config(method=Lora()), LLAMA8, 1, 24 * GIGA).scoring is None
    assert [stage.words for stage in settle(config(method=Lora()), LLAMA8, 1, 80 * GIGA).stages] == [
        "training no checkpointing"
    ]


def test_old_settings_are_read():
    for old, new in ((True, "on"), (False, "off")):
        assert ModelConfig(activation_checkpointing=old) == ModelConfig(activation_checkpointing=new)
    assert replace(ModelConfig(), activation_checkpointing=True) == ModelConfig(activation_checkpointing="on")
    for word, value in (("2048", 2048), ("auto", "auto")):
        assert parse(RunConfig, ["--score.tokens-per-batch", word], "").score.tokens_per_batch == value
    assert as_dict(RunConfig())["score"]["tokens_per_batch"] == "auto"
    with pytest.raises(UserError, match=r"--score.tokens-per-batch 0: must be at least 1"):
        ScoreConfig(tokens_per_batch=0)


def test_partition_comes_after_checkpointing():
    """It follows from the settings and the GPU alone; a quantised model is never cut up."""
    auto = config(model=ModelConfig())
    assert not partition(auto, LLAMA8, 8, 24 * GIGA)[0]
    large = TrainConfig(global_batch_size=40)  # 5 sentences a forward
    assert not partition(replace(auto, train=large), LLAMA8, 8, 24 * GIGA)[0]
    off = ModelConfig(activation_checkpointing="off")
    assert partition(config(model=off, train=large), LLAMA8, 8, 24 * GIGA)[0]
    assert partition(config(model=ModelConfig(quantize="nf4")), LLAMA70, 8, 24 * GIGA) == (
        False,
        "partition off: --model.quantize nf4 needs whole weights",
    )


# ---------------------------------------------------------------- the dry run


def small_run(folder: Path) -> RunConfig:
    """A CANEFT run of two domains and a model of two layers; its folder is that of `folder`."""
    toys.model_of_bytes("llama").save_pretrained(folder / "model")
    toys.bytes_tokenizer(True).save_pretrained(folder / "model")
    for domain in ("it", "law"):
        for split in ("train", "dev", "test"):
            path = folder / "data" / "de-en" / domain / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [{"de": f"Das {domain} {split} {i}", "en": f"the {i} {domain}"} for i in range(4)]
            path.write_text("".join(json.dumps({"translation": row}) + "\n" for row in rows))
    return RunConfig(
        out=str(folder / "out"),
        model=ModelConfig(path=str(folder / "model")),
        data=DataConfig(dir=str(folder / "data"), prompt="short", seen=("it", "law"), unseen=()),
        score=ScoreConfig(tokens_per_batch=600),
        train=TrainConfig(epochs=1, global_batch_size=4, learning_rate=1e-3),
    )


def test_what_is_settled_reaches_every_stage_and_changes_no_bit(tmp_path, monkeypatch, capsys):
    run, loaded, found = small_run(tmp_path), [], {}
    real = load.load_model

    def load_model(path, config, *args, **kwargs):
        loaded.append(config.activation_checkpointing)
        return real(path, config, *args, **kwargs)

    monkeypatch.setattr(load, "load_model", load_model)
    distributed.start(3)
    for name, memory_of in (("none", (None, None)), ("large", (GIGA, GIGA)), ("small", (GIGA, 100))):
        monkeypatch.setattr(distributed, "gpu_memory", lambda memory_of=memory_of: memory_of)
        one = replace(run, out=str(tmp_path / name))
        run_one(one, Run.to_model)
        stored = json.loads((tmp_path / name / "config.json").read_text())
        assert stored["model"]["activation_checkpointing"] == stored["score"]["counts"] == "auto"
        found[name] = load_file(tmp_path / name / "model" / "model.safetensors")
        found[name] |= load_file(tmp_path / name / "statistics.safetensors")
    assert loaded == ["off"] * 4 + ["on"] * 2  # scoring and training of each
    for name in ("large", "small"):
        assert found[name].keys() == found["none"].keys()
        assert all(torch.equal(found[name][key], found["none"][key]) for key in found["none"])
    said = capsys.readouterr().out
    assert said.count("the fastest settings that fit 95% of the ") == 2
    assert re.search(
        r"scoring 600 tokens a batch, checkpointing, counts on the host \(0.0 GB: too large, and noth", said
    )


def test_slicetune_score_settles_too(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "gpu_memory", lambda: (24 * GIGA, 24 * GIGA))
    model, score = for_scoring(ModelConfig(partition="off"), ScoreConfig(), LLAMA8, 4, 512)
    assert (score.tokens_per_batch, score.counts, model.activation_checkpointing) == (1024, "host", "off")
    said = capsys.readouterr().out
    assert said == (
        "the fastest settings that fit 95% of the 24.0 GB free on a GPU: scoring 1,024 tokens a batch, "
        "no checkpointing, counts on the host (20.7 GB)\n"
    )
    monkeypatch.setattr(distributed, "gpu_memory", lambda: (None, None))
    assert for_scoring(ModelConfig(partition="off"), ScoreConfig(), LLAMA8, 4, 512)[1].tokens_per_batch == 4096
    assert capsys.readouterr().out == ""


def test_training_is_counted_again_with_the_neurons_that_were_chosen(tmp_path, capsys):
    """1 % of the neurons, but all of them rows of `down`, which are the dearest: the GPU holds them no more."""
    layer = torch.arange(LLAMA8.neurons_per_layer)[-LLAMA8.hidden :]
    down = (torch.arange(3)[:, None] * LLAMA8.neurons_per_layer + layer).flatten()[:10_486]
    NeuronSet.from_flat(down, LLAMA8).save(tmp_path / "neurons.safetensors")
    run, room = config(out=str(tmp_path)), int(29.5 * GIGA)
    found = settle(run, LLAMA8, 1, room)
    job = SimpleNamespace(
        config=run, shape=LLAMA8, partitioned=False, room=room, settled=found, training=found.training.config
    )
    assert not job.training.model.checkpoints
    Job.training_once_chosen(job)
    assert job.settled.training.config.model.checkpoints
    assert (
        capsys.readouterr().out
        == "with the 150,327,296 parameters that are trained: training checkpointing (20.9 GB)\n"
    )
    job.room = None
    assert Job.training_once_chosen(job) is job.training


def test_an_error_of_memory_names_what_helps():
    def said(stage: str, run: RunConfig | None = None, world: int = 1) -> str:
        error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        error.add_note(f"in the {stage} stage")
        if run:
            error.useless = {stage.split()[0]: useless(run, world)}
        return describe(error)[1]

    run = settle(config(), LLAMA8, 1, 24 * GIGA)
    end = "; the run's command with --dry-run --gpu-memory N says what fits N GB"
    assert said("score", run.scoring.config).endswith(
        ": take a smaller --score.tokens-per-batch, --model.activation-checkpointing on, --model.quantize nf4" + end
    )
    assert said("train", run.training.config).endswith(
        ": take a smaller --train.micro-batch-size, --model.recompute-ffn, --model.quantize nf4" + end
    )
    assert said("translate base", config("nf4", evaluate=EvaluateConfig(on="full"))).endswith(
        ": take a smaller --evaluate.batch-size, --evaluate.on quantised" + end
    )
    assert "--model.partition on (several GPUs)" in said("train", run.training.config, world=2)
    assert "nf4" not in said("train", settle(config(method=Full()), LLAMA8, 1, 24 * GIGA).training.config)
    for flag in ("--train.micro-batch-size", "--score.tokens-per-batch", "--evaluate.batch-size"):
        assert flag in said("unknown")
