"""The dry run's last table: settings that fit, best first, with all flags that they take."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from eight_b import GIGA, LLAMA8, config

from slicetune.engine import cli
from slicetune.engine.common.command import parse
from slicetune.engine.evaluation.config import EvaluateConfig
from slicetune.engine.methods.base import Full
from slicetune.engine.methods.landermt.settings import Layers
from slicetune.engine.methods.llama_pro import LlamaPro
from slicetune.engine.models.config import ModelConfig
from slicetune.engine.run.config import RunConfig
from slicetune.engine.run.forecast import fit
from slicetune.engine.run.forecast.estimate import dry_run_text
from slicetune.engine.scoring.config import ScoreConfig
from slicetune.engine.training.config import TrainConfig, ZeroConfig


def ways(run: RunConfig, gigabytes: float, world: int = 1, shape=LLAMA8) -> list[str]:
    """The last table's lines."""
    text = dry_run_text(run, shape, world, int(gigabytes * GIGA))
    return text[text.index("What fits in") :].splitlines()


def test_the_8b_on_a_small_card():
    """5 × 96 tokens, 1 % slices, in nf4: all stages fit 12 GB, and the line says with which settings."""
    run = config("nf4", length=96)
    lines = ways(run, 12)
    (line,) = (line for line in lines if "as set" in line)
    sizes = [float(size) for size in re.search(r"([\d.]+), ([\d.]+), ([\d.]+) GB$", line).groups()]
    assert max(sizes) <= 0.95 * 12
    assert sizes[1] == pytest.approx(9.1, abs=1)
    assert "training no checkpointing" in line


def test_the_default_recipe_fits_24_gb(capsys, monkeypatch, tmp_path):
    from slicetune.recipes import caneft_llama31

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ["--dry-run", "--gpu-memory", "24", "--gpus", "1", "--out", str(tmp_path)]
    cli.main(caneft_llama31.CONFIG, words)
    said = capsys.readouterr().out
    assert "  1. as set (scoring 1,024 tokens a batch, no checkpointing, counts on the host; training chec" in said
    assert re.search(r"activation_checkpointing +auto → off while scoring, on while training$", said, re.M)
    assert re.search(r"tokens_per_batch +auto → 1024 while scoring, 4096 for the dev loss$", said, re.M)
    assert re.search(r"score.counts +auto → host$", said, re.M)
    assert "too large" not in said


def test_best_first():
    """Full precision before 8 bits before 4; whole before partitioned; every line's sizes fit."""
    auto = replace(config(), model=ModelConfig())
    title, *lines = ways(auto, 80, 8)
    assert title.endswith("best first: flags to add (how it then runs): GB while scoring, training, decoding")
    heads = ["as set (", "--model.partition on (", *(f"--model.quantize {kind}" for kind in ("int8", "fp8", "nf4"))]
    assert [line.startswith(f"  {n}. {head}") for n, (line, head) in enumerate(zip(lines, heads, strict=True), 1)] == (
        [True] * 5
    )
    assert "--model.quantize fp8 (an experiment, for Ada, Hopper and later GPUs; scoring " in lines[3]
    for method in (Full(), LlamaPro(), Layers()):
        assert not any("quantize" in line for line in ways(replace(auto, method=method), 80, 8))


def test_a_line_has_every_flag_that_it_takes():
    """Parsed again, it is a run that fits as set."""
    stubborn = config(
        model=ModelConfig(activation_checkpointing="off", compile="blocks"),
        score=ScoreConfig(tokens_per_batch=4096, counts="device"),
        train=TrainConfig(global_batch_size=5),
        evaluate=EvaluateConfig(batch_size=64),
    )
    for gigabytes in (8, 12, 16, 24):
        for line in ways(stubborn, gigabytes)[1:]:
            flags = re.match(r"  \d\. (.*?) \(", line)[1]
            again = parse(RunConfig, flags.split(), "", default=stubborn)
            assert any("as set" in other for other in ways(again, gigabytes)), flags


def test_fewer_sentences_a_forward_are_tried_without_stage_2_too():
    """Its bucket of gradients is larger than the slices' own: what fits without it was called too large."""
    own = config(length=512, train=TrainConfig(global_batch_size=15))
    lines = ways(own, 7.8, 3)
    assert any("--model.quantize nf4 --train.micro-batch-size 1" in line for line in lines[1:]), lines
    assert "best first: nothing" not in lines[0]


def test_where_nothing_fits_the_remedies_are_tried():
    title, least, remedy = ways(config(method=Full()), 24)
    assert title.endswith("best first: nothing")
    assert least.startswith("  the leanest: ")
    assert remedy == "  take larger GPUs"  # Adam's moments of the whole model, and its weights
    assert ways(config(length=4096, model=ModelConfig(partition="off")), 8)[-1] == (
        "  take a smaller --data.max-length, or larger GPUs"
    )
    full = config("nf4", length=96, evaluate=EvaluateConfig(on="full"))  # the plain model decodes
    assert ways(full, 12)[-1].startswith("  take --evaluate.on quantised, or ")


def test_the_flags_of_a_way_are_the_differences():
    own = config()
    other = replace(own, zero=ZeroConfig(2), evaluate=EvaluateConfig(batch_size=8))
    assert fit._flags(own, other) == "--zero.stage 2 --evaluate.batch-size 8"
    assert fit._flags(own, own) == ""


# ---------------------------------------------------------------- what a run does with it
