"""A run measures whether its base knows the prompt, by losses written out here; it changes neither model nor draws."""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toys

from slicetune.engine.data.config import DataConfig
from slicetune.engine.data.corpus import directions, load_domain
from slicetune.engine.data.prompts import PLAIN, encode, resolve
from slicetune.engine.methods.base import Base
from slicetune.engine.models.config import ModelConfig
from slicetune.engine.models.load import load_model
from slicetune.engine.run import prompted
from slicetune.engine.run.config import RunConfig
from slicetune.engine.run.job import Job
from slicetune.engine.run.prompted import FAR, SENTENCES, Known, known, warned
from slicetune.engine.run.run import run_one

PLAIN_TEXT = PLAIN[0]
EACH = 6
"""Sentences of each of three domains in two directions, to be 32 or more."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Random models of bytes: a Llama with a chat template, a BLOOM with plain lines."""
    paths = {kind: tmp_path_factory.mktemp(kind) for kind in ("llama", "bloom")}
    for kind, path in paths.items():
        toys.model_of_bytes(kind).save_pretrained(path)
        toys.bytes_tokenizer(chat=kind == "llama").save_pretrained(path)
    return paths


@pytest.fixture
def folder(folders) -> Path:
    return folders["llama"]


@functools.cache
def made(folder: Path) -> Job:
    fields = {"dir": "tiny", "pairs": ("de-en", "en-de"), "seen": ("it", "law"), "prompt": "paper", "max_length": 700}
    model = ModelConfig(path=str(folder), dtype="float32")
    return Job(RunConfig(model=model, data=DataConfig(**fields)))


def job(folder: Path, out: Path, **data) -> Job:
    """A run's inputs with some of --data.* changed."""
    one = copy.copy(made(folder))
    one.out, one.config = out, replace(one.config, out=str(out), data=replace(one.config.data, **data))
    one.directions = directions(one.config.data)
    return one


def base_of(job: Job) -> torch.nn.Module:
    return load_model(str(job.base), job.config.model, torch.device("cpu"))


def by_hand(job: Job, prompt: str) -> float:
    """Nats a target token over the first sentences of each domain and direction, one at a time, in float64."""
    model, nats = base_of(job).double(), []
    for data in directions(replace(job.config.data, prompt=prompt)):
        splits = {domain: "dev" if domain in data.seen else "test" for domain in data.domains}
        for pair in (p for domain in data.domains for p in load_domain(data, domain, splits[domain], EACH)):
            ids, start = encode(job.tokenizer, resolve(data), pair)
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0]
            nats += [float(torch.logsumexp(logits[i - 1], 0) - logits[i - 1, ids[i]]) for i in range(start, len(ids))]
    return sum(nats) / len(nats)


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_losses_are_those_written_out(kind, folders, tmp_path, monkeypatch):
    folder = folders[kind]
    one = job(folder, tmp_path)
    base, drawn = base_of(one), torch.get_rng_state()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    assert warned(one, base) is base
    assert not base.training
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    found, hand = known(one), {prompt: by_hand(one, prompt) for prompt in ("paper", *PLAIN)}
    assert found.loss == pytest.approx(hand["paper"], rel=1e-5)
    assert found.plain == min(PLAIN, key=hand.__getitem__)
    assert found.plain_loss == pytest.approx(hand[found.plain], rel=1e-5)
    assert found.sentences == 6 * EACH >= SENTENCES
    monkeypatch.setattr(prompted, "_losses", None)  # a second stage, or a run that is resumed, measures nothing
    warned(one, base)
    assert known(one) == found
    assert known(job(folder, tmp_path, prompt="short")) is None  # another prompt's are not taken for this one's


def test_nothing_is_measured_without_dev_sentences(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prompted, "_losses", None)
    for own in ({"dev_sentences": 0}, {"max_length": 8}):
        one = job(folder, tmp_path, **own)
        warned(one, torch.nn.Identity())
        assert known(one) is None


@pytest.mark.parametrize("own", ["short", PLAIN_TEXT])
def test_the_other_plain_prompt_is_what_a_plain_one_is_compared_with(own, folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(prompted, "_losses", lambda *args: asked.append(args[2]) or [3.0, 3.0 - FAR / 2])
    warned(one := job(folder, tmp_path, prompt=own), torch.nn.Identity())
    assert asked == [2]
    assert (known(one).given, known(one).plain) == (own, next(prompt for prompt in PLAIN if prompt != own))


def test_the_warning_names_the_better_prompt(folder, tmp_path, monkeypatch, capsys):
    for loss, warns in ((3.0 + 1.5 * FAR, True), (3.0 + FAR / 2, False), (2.0, False), (float("nan"), False)):
        (tmp_path / "prompt.json").unlink(missing_ok=True)
        monkeypatch.setattr(prompted, "_losses", lambda *args, loss=loss: [loss, 3.0, 3.5])
        one = job(folder, tmp_path)
        capsys.readouterr()
        warned(one, torch.nn.Identity())
        out = capsys.readouterr().out
        assert bool(out) == warns
        assert (known(one) is None) == (loss != loss)
    line = Known("paper", 3.15, PLAIN_TEXT, 3.0, 32).warning()
    assert len(line.splitlines()) == 2
    assert '--data.prompt "paper" its loss on 32 sentences is 3.15 nats' in line
    assert f'with --data.prompt "{PLAIN_TEXT}" 3.00' in line


def test_ranks_that_share_a_model_find_the_same(folder, tmp_path, pool):
    one = job(folder, tmp_path)
    warned(one, base_of(one))
    (tmp_path / "ranks").mkdir()
    config = replace(one.config, out=str(tmp_path / "ranks"))
    for held in ("whole", "partitioned", "parallel"):
        (tmp_path / "ranks" / "prompt.json").unlink(missing_ok=True)
        first, second = pool.run("prompt_losses", config, held)
        assert first == second
        assert first.loss == pytest.approx(known(one).loss, rel=1e-5), held
        assert first.plain_loss == pytest.approx(known(one).plain_loss, rel=1e-5), held


@pytest.mark.parametrize("held", ["whole", "partitioned"])
def test_training_has_the_same_bits(held, tmp_path, pool):
    toys.model().save_pretrained(tmp_path / "base")
    trained = [
        pool.run("train_looked_at", str(tmp_path / "base"), str(tmp_path / f"{look}"), held, look)[0]
        for look in (True, False)
    ]
    assert trained[0].keys() == trained[1].keys()
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_a_run_of_the_base_keeps_it_in_its_results(folders, tmp_path):
    """Measured where the base is decoded."""
    config = job(folders["bloom"], tmp_path / "out").config
    data = replace(config.data, test_sentences=1, unseen=())
    run_one(replace(config, data=data, method=Base(), evaluate=replace(config.evaluate, max_new_tokens=2)))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["prompt"]["given"] == "paper"
    assert prompted.of_results(results) == Known(**results["prompt"])
    assert prompted.of_results({}) is None


def test_an_unseen_domain_that_the_base_knows_tells_prompts_apart(folder, tmp_path, monkeypatch):
    """The base was taught none of the seen domains: what it knows are test sentences of the unseen one."""
    read = []
    monkeypatch.setattr(prompted, "_losses", lambda _, sentences, *rest: read.extend(sentences) or [3.0, 3.0, 3.0])
    warned(job(folder, tmp_path, seen=("it",), unseen=("koran",), test_sentences=3), torch.nn.Identity())
    split = {uid.rpartition("/")[0] for uid in (example.uid for example in read)}
    assert split == {f"{pair}/{part}" for pair in ("de-en", "en-de") for part in ("it/dev", "koran/test")}
