"""Two-rank torchrun jobs that get signals and kills while scoring, training and decoding, and then go on.

The jobs that are struck have the model in parts, of half of the kills: they end with the bits of whole replicas.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from jobs import TWO_RANKS, finish, ranks, start, wait_for
from safetensors.torch import load_file

from slicetune.engine.data import tiny
from slicetune.engine.run import status

KILLS = int(os.environ.get("SLICETUNE_JOB_KILLS", "0"))
"""Jobs to kill; `make faults` kills ten and sends signals in training too, which test_interrupts.py has in small."""
UNBROKEN = os.environ.get("SLICETUNE_UNBROKEN", "")
"""Where `make faults` keeps the unbroken run, which all of its pieces compare with."""
SLOW = {"data.train-sentences": "40", "data.dev-sentences": "4", "train.save-steps": "1", "score.save-minutes": "0"}
"""Enough batches in every stage for a signal to arrive within it."""
MANY = {
    "data.score-sentences": "200",
    "score.tokens-per-batch": "256",
    "data.test-sentences": "30",
    "evaluate.batch-size": "2",
}
PARTS = {"model.partition": "on"}


@pytest.fixture(scope="module")
def base() -> Path:
    return tiny.model_dir("test")


@pytest.fixture(scope="module")
def unbroken(base, tmp_path_factory) -> Path:
    out = Path(UNBROKEN) if UNBROKEN else tmp_path_factory.mktemp("unbroken") / "out"
    finish(start(TWO_RANKS, base, out, **SLOW, **MANY))
    assert status.read(out)["state"] == "complete"
    return out


def results(out: Path) -> dict:
    """All that a run is for: statistics, neurons, weights, translations and their scores."""
    tensors = {n: load_file(out / f"{n}.safetensors") for n in ("statistics", "neurons", "model/model")}
    bits = {name: {k: t.numpy().tobytes() for k, t in each.items()} for name, each in tensors.items()}
    texts = {str(p.relative_to(out)): p.read_text() for p in sorted((out / "translations").rglob("*.en"))}
    return bits | texts | {"systems": json.loads((out / "results.json").read_text())["systems"]}


def stop(base: Path, out: Path, words: str, strike, **flags: str) -> dict:
    """Start, wait until `words` are printed, strike at the job; how status.json says that it ended."""
    log = out.with_suffix(".log")
    agent = start(TWO_RANKS, base, out, log, **SLOW, **MANY, **flags)
    try:
        wait_for(log, words, agent)
        strike(agent)
        agent.wait(timeout=120)
    finally:
        if agent.poll() is None:
            os.killpg(agent.pid, signal.SIGKILL)
    assert agent.returncode != 0, "the signal came too late"
    return status.read(out) | {"log": log.read_text()}


def to_agent(number: int):
    return lambda agent: agent.send_signal(number)


def twice_to_rank(rank: int, number: int):
    def strike(agent):
        for _ in range(2):
            os.kill(ranks(agent)[rank], number)

    return strike


def test_signals_in_every_stage_lose_nothing(base, unbroken, tmp_path):
    out = tmp_path / "out"
    ends = [
        ("[score]", twice_to_rank(1, signal.SIGTERM)),
        ("[train]", to_agent(signal.SIGTERM)),
        ("[train]", twice_to_rank(0, signal.SIGINT)),
        ("caneft: it:", to_agent(signal.SIGTERM)),  # the first of five test sets is translated
    ]
    for words, strike in ends if KILLS else (ends[0], ends[3]):
        ended = stop(base, out, words, strike, **PARTS)
        assert (ended["state"], ended["exit_code"]) == ("interrupted", 75), ended["log"][-3000:]
        assert "error: interrupted by a signal while" in ended["log"]
        assert "engine/run/run.py" not in ended["log"], "a traceback of ours"
    output = finish(start(TWO_RANKS, base, out, **SLOW, **MANY, **PARTS))
    assert "caneft: it: translated before" in output
    assert status.read(out)["state"] == "complete"
    assert results(out) == results(unbroken)


@pytest.mark.parametrize("trial", range(KILLS))
def test_a_killed_job_goes_on_to_the_same_bits(base, unbroken, tmp_path, trial):
    """kill -9 of one rank, or of agent and ranks at once as when a machine fails; `make faults` does ten."""
    draw, out = random.Random(trial), tmp_path / "out"
    words, how = ("[train]", "[score]", "[translate]")[trial % 3], PARTS if trial % 4 < 2 else {}

    def strike(agent):
        time.sleep(draw.uniform(0, 1))
        victims = ranks(agent)
        for pid in [agent.pid, *victims] if trial % 2 else [draw.choice(victims)]:
            os.kill(pid, signal.SIGKILL)

    ended = stop(base, out, words, strike, **how)
    assert ended["state"] in ("running", "failed"), ended["log"][-3000:]
    finish(start(TWO_RANKS, base, out, **SLOW, **MANY, **how))
    assert status.read(out)["state"] == "complete"
    assert results(out) == results(unbroken)
