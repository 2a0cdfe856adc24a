"""COMET: the protocol with a fake program, what a run makes of it, and the real package where its environment is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from slicetune.engine.common import signals
from slicetune.engine.common.errors import Interrupted
from slicetune.engine.common.files import read_lines, write_lines
from slicetune.engine.data import tiny
from slicetune.engine.data.config import DataConfig
from slicetune.engine.data.records import Pair
from slicetune.engine.evaluation import comet
from slicetune.engine.evaluation.config import EvaluateConfig
from slicetune.engine.evaluation.report.run import table
from slicetune.engine.methods.base import Base
from slicetune.engine.models.config import ModelConfig
from slicetune.engine.run import measure
from slicetune.engine.run.config import RunConfig
from slicetune.engine.run.run import run_one
from slicetune.engine.run.stages import Stages

SUPPORT = Path(__file__).parents[2] / "support"
TEXTS = {
    "source": ["Die Anlage wird geprüft.", "Der Ausschlag klingt ab."],
    "reference": ["The annex is being checked.", "The rash fades."],
    "base": ["The plant is checked.", ""],
    "caneft": ["The annex is being checked.", "The rash subsides."],
}


@pytest.fixture
def fake(tmp_path) -> str:
    """A python that runs fake_comet.py whatever program it is given."""
    script = tmp_path / "fake-python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{SUPPORT / "fake_comet.py"}" "$@"\n')
    script.chmod(0o755)
    return str(script)


def folder(tmp_path: Path) -> Path:
    for kind, lines in TEXTS.items():
        write_lines(tmp_path / f"translations/{kind}/it.{'de' if kind == 'source' else 'en'}", lines)
    return tmp_path


def references(out: Path) -> list[str]:
    file = out / "translations/reference/it.en"
    return read_lines(file) if file.is_file() else TEXTS["reference"]


def ask(out: Path, python: str, model: str = "default", systems: tuple[str, ...] = ("base", "caneft")) -> dict:
    """What a command of a later day would do in the run's folder."""
    config = RunConfig(
        out=str(out),
        data=DataConfig(seen=("it",), unseen=()),
        evaluate=EvaluateConfig(comet=model, comet_python=python),
    )
    pairs = [
        Pair(*sides, "it", i, ("de", "en"))
        for i, sides in enumerate(zip(TEXTS["source"], references(out), strict=True))
    ]
    return measure.comet_stage(config, systems, Stages(out), lambda: {"it": pairs})


def results(out: Path, said: dict) -> dict:
    entry = {"it": {"bleu": 10.0, "chrf": 30.0, "n": 2, "signatures": {"bleu": "b", "chrf": "c"}}}
    systems = {name: {"domains": json.loads(json.dumps(entry)), "averages": {}} for name in ("base", "caneft")}
    found = {"systems": systems, "seen": ["it"], "unseen": [], "trainable_parameters": 5}
    comet.add(found, said, out)
    return found


def test_scores_go_into_the_results_and_the_table(fake, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "SLURM_PROCID"):  # the fake asserts that it sees none of them
        monkeypatch.setenv(name, "0" if name == "RANK" else "1")
    out = folder(tmp_path)
    found = results(out, ask(out, fake))
    assert found["comet"] == {"model": comet.DEFAULT, "references": False, "version": "fake"}
    want = [len(set(a) & set(b)) / len(set(a)) for a, b in zip(TEXTS["caneft"], TEXTS["source"], strict=True)]
    assert found["systems"]["caneft"]["domains"]["it"]["comet"] == pytest.approx(50 * sum(want))
    assert found["systems"]["caneft"]["averages"]["seen"]["comet"] == pytest.approx(50 * sum(want))
    segments = json.loads((out / "comet.json").read_text())["systems"]["caneft"]["it"]["segments"]
    assert segments == pytest.approx(want)
    text = table(found)
    assert "caneft COMET" in text.replace("CANEFT", "caneft")
    assert f"{50 * sum(want):.2f}" in text
    assert f"{comet.DEFAULT}, without references, × 100 (unbabel-comet fake)" in text


def test_asking_again_asks_the_program_only_for_what_changed(fake, tmp_path, capsys):
    out = folder(tmp_path)
    ask(out, fake)
    first = (out / "comet.json").read_bytes()
    ask(out, fake)
    assert "[comet] done before" in capsys.readouterr().out
    write_lines(out / "translations/caneft/it.en", ["another", "text"])
    ask(out, fake)
    assert (out / "comet.json").read_bytes() != first
    said = ask(out, fake, model="some/reference-model")  # another model takes its place, nothing is refused
    assert results(out, said)["comet"]["references"] is True


@pytest.mark.parametrize(("model", "words"), [("gated", "gated is gated: accept its licence"), ("crash", "nobody")])
def test_a_failing_program_is_one_line_and_bleu_stands(fake, model, words, tmp_path, capsys):
    out = folder(tmp_path)
    said = ask(out, fake, model=model)
    assert words in said["comet"]["missing"]
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"COMET {model} is not computed: ")
    assert not (out / "comet.json").exists()
    found = results(out, said)
    assert "comet" not in found["systems"]["base"]["domains"]["it"]
    assert f"COMET                 {model} is not computed: " in table(found)


def test_without_an_environment_its_commands_are_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(comet.VARIABLE, raising=False)
    monkeypatch.setattr(comet, "environment", lambda: tmp_path / "my place" / ".venv-comet")
    said = ask(folder(tmp_path), "")
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    for words in ("not computed", "my place/.venv-comet'", "/bin/pip' install unbabel-comet==", "setuptools<81"):
        assert words in line, line
    assert "set one up" in said["comet"]["missing"]
    for where in ("flag", "variable"):
        monkeypatch.setenv(comet.VARIABLE, "/no/such/python" if where == "variable" else "")
        ask(folder(tmp_path), "/no/such/python" if where == "flag" else "")
        assert "/no/such/python: no program there" in capsys.readouterr().out


def test_nobody_asked(tmp_path):
    assert ask(tmp_path, "", model="") == {}


def test_a_signal_ends_the_program_too(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(comet, "WAIT", 0.2)
    monkeypatch.setattr(signals, "requested", lambda: True)
    monkeypatch.setattr(signals, "boundary", lambda what: None)
    started = []
    real = comet._start
    monkeypatch.setattr(comet, "_start", lambda *a: started.append(real(*a)) or started[0])
    with pytest.raises(Interrupted, match="COMET"):
        ask(folder(tmp_path), fake, model="slow")
    assert started[0].poll() is not None


def test_ranks_wait_together_and_hear_of_a_failure(fake, tmp_path, pool):
    out = folder(tmp_path)
    said = pool.run("ask_comet", str(out), fake, "default")
    assert said == [{"comet": {"model": comet.DEFAULT}}] * 2
    first, second = pool.run("ask_comet", str(out), fake, "gated")
    assert first == second
    assert "licence" in first["comet"]["missing"]


def test_asking_later_undoes_nothing(fake, tmp_path, capsys):
    """A whole run of the base model; then COMET is asked for, then not any more."""
    config = RunConfig(
        out=str(tmp_path / "out"),
        model=ModelConfig(path=str(tiny.model_dir("test"))),
        data=DataConfig(dir="tiny", prompt="short", seen=("it", "law"), dev_sentences=0, test_sentences=3),
        method=Base(),
        evaluate=EvaluateConfig(max_new_tokens=8),
    )
    (tmp_path / "out").mkdir()
    plain = run_one(config)
    stages = json.loads((tmp_path / "out/stages.json").read_text())
    config.evaluate = EvaluateConfig(max_new_tokens=8, comet="default", comet_python=fake)
    capsys.readouterr()
    found = run_one(config)
    said = capsys.readouterr().out
    assert "[translate base] done before" in said
    assert {k: v for k, v in json.loads((tmp_path / "out/stages.json").read_text()).items() if k != "comet"} == stages
    for domain, scores in found["systems"]["base"]["domains"].items():
        assert 0 <= scores.pop("comet") <= 100
        assert scores == plain["systems"]["base"]["domains"][domain]
    assert set(found["systems"]["base"]["averages"]["all"]) == {"bleu", "chrf", "comet"}
    assert comet.DEFAULT in (tmp_path / "out/report.html").read_text()
    config.evaluate = EvaluateConfig(max_new_tokens=8)
    assert "comet" not in run_one(config)
    readme = (
        (SUPPORT.parents[1] / "engine/run/README.md")
        .read_text()
        .split("`results.json` holds")[1]
        .split("What a method does")[0]
    )
    stored = json.loads((tmp_path / "out/results.json").read_text())
    assert not [key for key in (*stored, *found) if f"`{key}`" not in readme and key != "report"]


# ---------------------------------------------------------------- the real package, where its environment is


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> tuple[str, Path]:
    """The Python of COMET's environment, and small checkpoints that COMET itself has saved with random weights."""
    try:
        python = comet.python()
    except comet.Unavailable:
        pytest.skip("no environment with COMET: make comet-env")
    out = tmp_path_factory.mktemp("comet")
    command = [python, "-I", "-W", "ignore", SUPPORT / "tiny_comet.py", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return str(python), out


def test_real_comet_scores_with_and_without_references(real, tmp_path):
    python, models = real
    scores = {}
    for changed in (False, True):
        for kind in ("kiwi", "da"):
            out = folder(tmp_path / f"{kind}-{changed}")
            if changed:
                write_lines(out / "translations/reference/it.en", ["The annex is shut.", "The rash is bad."])
            found = results(out, ask(out, python, model=str(models / kind)))
            assert found["comet"] == {"model": str(models / kind), "references": kind == "da", "version": "2.2.7"}
            said = json.loads((out / "comet.json").read_text())["systems"]
            for system in ("base", "caneft"):
                whole, parts = said[system]["it"]["score"], said[system]["it"]["segments"]
                assert whole == pytest.approx(sum(parts) / len(parts), rel=1e-6)
                assert found["systems"][system]["domains"]["it"]["comet"] == 100 * whole
            scores[kind, changed] = [said[system]["it"]["segments"] for system in ("base", "caneft")]
    assert scores["kiwi", False] == scores["kiwi", True]
    assert scores["da", False] != scores["da", True]
    assert scores["kiwi", False][0] != scores["kiwi", False][1]


def test_real_comet_explains_what_it_cannot_have(real, tmp_path, monkeypatch, capsys):
    python, models = real
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no-cache"))
    assert "not in the hub's cache" in ask(folder(tmp_path), python)["comet"]["missing"]
    assert "no such file" in ask(folder(tmp_path), python, model=str(models))["comet"]["missing"]
