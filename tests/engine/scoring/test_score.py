"""Scoring and selection for any task: labelled files, the function and the program, every method that selects."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from slicetune.engine import commands
from slicetune.engine.common import signals
from slicetune.engine.common.errors import Interrupted, UserError
from slicetune.engine.common.settings import of_stage
from slicetune.engine.data import labelled, tiny
from slicetune.engine.methods.caneft.settings import Caneft, Rcn
from slicetune.engine.methods.given import Given
from slicetune.engine.methods.lape import Lape
from slicetune.engine.methods.select import select
from slicetune.engine.models.config import ModelConfig
from slicetune.engine.models.load import config_json, load_model
from slicetune.engine.models.shapes import from_config
from slicetune.engine.scoring.config import ScoreConfig
from slicetune.engine.scoring.passes import score as add_scores
from slicetune.engine.scoring.score import score
from slicetune.engine.scoring.statistics import Statistics
from slicetune.engine.slices.neurons import NeuronSet

SMALL = ScoreConfig(tokens_per_batch=64)


@pytest.fixture(scope="module")
def base() -> Path:
    return tiny.model_dir("test")


def line(prompt: str, target: str, **more: object) -> str:
    return json.dumps({"prompt": prompt, "target": target, **more}) + "\n"


@pytest.fixture
def files(tmp_path) -> list[str]:
    """Two topics, one of them a file of its own (compressed), the other named in each record."""
    code = "".join(line(f"def f{i}(a):", f" return a + {i}") for i in range(9))
    (tmp_path / "code.jsonl.gz").write_bytes(gzip.compress(code.encode()))
    talk = "".join(
        line(f"Say it {i} times.", "Nothing is said of it " + "again " * (i % 3), group="talk") for i in range(8)
    )
    (tmp_path / "others.jsonl").write_text(talk + "\n")
    return [str(tmp_path / "code.jsonl.gz"), str(tmp_path / "others.jsonl")]


def loading(base: Path) -> ModelConfig:
    return ModelConfig(path=str(base), dtype="float32")


def equal(a: Statistics, b: Statistics) -> bool:
    pairs = [(a.histogram[p], b.histogram[p]) for p in a.histogram] + [(a.total[p], b.total[p]) for p in a.total]
    pairs += [(a.active, b.active), (a.activation, b.activation), (a.samples, b.samples), (a.tokens, b.tokens)]
    return a.groups == b.groups and all(torch.equal(x, y) for x, y in pairs)


def test_groups_are_files_or_fields(files):
    samples = labelled.read(files)
    assert labelled.groups(samples) == ["code", "talk"]
    assert [(s.prompt, s.target, s.group) for s in samples[:1]] == [("def f0(a):", " return a + 0", "code")]
    assert samples[9].uid == f"{files[1]}:1"


def test_texts_are_read_as_they_stand_and_messages_by_the_template(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    words = [{"role": "user", "content": "Die Anlage."}, {"role": "assistant", "content": "The annex."}]
    (tmp_path / "a.jsonl").write_text(line("Die Anlage:", " the annex") + json.dumps({"messages": words}) + "\n")
    (first, second), dropped = labelled.encode(tokenizer, labelled.read([str(tmp_path / "a.jsonl")]), 512)
    own = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    bos = [tokenizer.bos_token_id] if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else []
    assert first.input_ids == [*bos, *own("Die Anlage:"), *own(" the annex"), tokenizer.eos_token_id]
    assert first.target_start == len(bos) + len(own("Die Anlage:"))
    assert not dropped
    if not tokenizer.chat_template:
        pytest.fail("the tiny tokenizer is meant to have a chat template")
    text = tokenizer.apply_chat_template(words[:1], tokenize=False, add_generation_prompt=True)
    assert second.input_ids[: second.target_start] == own(text)
    assert tokenizer.decode(second.input_ids[second.target_start :]).startswith("The annex.")
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"a\.jsonl:2: messages, but the tokenizer has no chat template"):
        labelled.encode(tokenizer, labelled.read([str(tmp_path / "a.jsonl")]), 512)
    kept, dropped = labelled.encode(tokenizer, labelled.read([str(tmp_path / "a.jsonl")])[:1], 3)
    assert (kept, dropped) == ([], {"a: longer than 3 tokens": 1})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("no json\n", ":1: not JSON"),
        ("[1]\n", "not a JSON object"),
        (line("a", "b") + '{"prompt": "a"}\n', ":2: 'target' is no text"),
        (line("a", ""), "an empty target"),
        (line("a", "b", group=3), "'group' is no text"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "ends with an assistant's"),
        ('{"messages": "a"}\n', "must be a list of role and content"),
        ("\n", "no sample"),
    ],
)
def test_a_broken_line_is_named(content, words, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=words):
        labelled.read([str(tmp_path / "a.jsonl")])


def test_a_missing_or_damaged_file_is_named(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    for name in ("a.jsonl.gz", "nowhere.jsonl"):
        with pytest.raises(UserError, match=rf"{name}: cannot be read"):
            labelled.read([str(tmp_path / name)])


def test_scores_are_those_of_the_pass_and_are_read_again(base, files, tmp_path, capsys):
    out = tmp_path / "statistics.safetensors"
    got = score(loading(base), files, SMALL, out)
    tokenizer = AutoTokenizer.from_pretrained(base)
    examples, _ = labelled.encode(tokenizer, labelled.read(files), 512)
    want = Statistics(["code", "talk"], from_config(config_json(base)), got.lowest_octave)
    model = load_model(str(base), loading(base), torch.device("cpu"))
    add_scores(model, examples, want, SMALL, pad_id=tokenizer.pad_token_id)
    assert equal(got, want)
    assert got.samples.tolist() == [9, 8]
    assert {path.name for path in tmp_path.iterdir()} == {"code.jsonl.gz", "others.jsonl", out.name}
    before = out.stat().st_mtime_ns
    assert equal(score(loading(base), files, ScoreConfig(tokens_per_batch=128), out), want)  # no setting that counts
    assert out.stat().st_mtime_ns == before
    assert "is there already" in capsys.readouterr().out
    for config, names in ((ScoreConfig(tokens="target"), files), (SMALL, files[:1])):
        with pytest.raises(UserError, match="was made with other settings"):
            score(loading(base), names, config, out)
    Path(files[1]).write_text(line("another", "text"))
    with pytest.raises(UserError, match=r"files\..*others\.jsonl"):
        score(loading(base), files, SMALL, out)


def test_an_interrupted_pass_goes_on_to_the_same_bits(base, files, tmp_path, monkeypatch, capsys):
    whole = score(loading(base), files, SMALL, tmp_path / "whole.safetensors")
    asked = iter([False, False, True])
    monkeypatch.setattr(signals, "requested", lambda: next(asked))
    with pytest.raises(Interrupted):
        score(loading(base), files, SMALL, tmp_path / "broken.safetensors")
    assert not (tmp_path / "broken.safetensors").exists()
    monkeypatch.setattr(signals, "requested", lambda: False)
    assert equal(score(loading(base), files, SMALL, tmp_path / "broken.safetensors"), whole)
    assert "goes on after 3 batches" in capsys.readouterr().out
    assert not (tmp_path / "broken.safetensors.partial").exists()


def test_ranks_share_the_samples(base, files, tmp_path, pool):
    one = score(loading(base), files, SMALL, tmp_path / "one.safetensors")
    for got in pool.run("score_files", str(base), files, str(tmp_path / "two.safetensors")):
        assert torch.equal(got.pop("samples"), one.samples)
        assert all(torch.equal(got[p], one.histogram[p]) for p in one.histogram)
    assert Statistics.load(tmp_path / "two.safetensors").provenance == one.provenance


def test_every_method_selects_from_them(base, files, tmp_path):
    statistics = score(loading(base), files, SMALL, tmp_path / "statistics.safetensors")
    shape = from_config(config_json(base))
    caneft = select(statistics)
    caneft.save(tmp_path / "caneft.safetensors")
    assert caneft == Caneft().select(statistics, shape, 0)[0]
    rcn = select(statistics, Rcn(), seed=3)
    assert (rcn.counts(), rcn == caneft) == (caneft.counts(), False)
    assert rcn == Rcn().select(statistics, shape, 3)[0]
    for method in (Lape(neuron_ratio=0.05), Lape(match=str(tmp_path / "caneft.safetensors"))):
        assert select(statistics, method) == method.select(statistics, shape, 0)[0]
    given = Given(files=(str(tmp_path / "caneft.safetensors"),))
    assert select(statistics, given) == select(None, given, shape) == caneft
    with pytest.raises(UserError, match="lape needs statistics"):
        select(None, Lape(), shape)
    with pytest.raises(UserError, match="given needs the model"):
        select(None, given)


def test_select_as_a_program_takes_the_methods_own_flags(base, files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    statistics = score(loading(base), files, SMALL, "statistics.safetensors")
    commands.main(
        ["select", "statistics.safetensors", "--method", "lape", "--method.neuron-ratio", "0.05", "--out", "l.st"]
    )
    assert NeuronSet.load("l.st") == select(statistics, Lape(neuron_ratio=0.05))
    commands.main(["select", "statistics.safetensors", "--method", "rcn", "--seed", "3", "--out", "r.st"])
    assert NeuronSet.load("r.st") == select(statistics, Rcn(), seed=3)
    Path("mine.json").write_text('[[0, "gate", 1]]')
    words = ["--method", "given", "--method.files", "mine.json", "l.st", "--model", str(base), "--out", "g.st"]
    commands.main(["select", *words])
    assert NeuronSet.load("g.st").count == 1 + NeuronSet.load("l.st").count - (
        1 in NeuronSet.load("l.st").slices.get((0, "gate", "row"), [])
    )
    assert "→ g.st" in capsys.readouterr().out
    for words, said in (
        (["--method", "full"], "--method full: chooses no neurons; there are "),
        (["--method"], "--method: name one of lape rcn caneft given"),
        (["--method", "rcn"], "rcn needs statistics.safetensors"),
    ):
        with pytest.raises(SystemExit) as stop:
            commands.main(["select", *words])
        assert stop.value.code == 2
        assert said in capsys.readouterr().err


def test_score_as_a_program(base, files, tmp_path):
    command = [
        sys.executable,
        "-m",
        "slicetune.engine",
        "score",
        *files,
        "--model.path",
        base,
        "--model.dtype",
        "float32",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "17 samples (code 9, talk 8), " in done.stdout
    assert Statistics.load(tmp_path / "statistics.safetensors").groups == ["code", "talk"]
    assert of_stage(ScoreConfig(), "score").keys() == {"loss", "tokens", "token_reduce"}
