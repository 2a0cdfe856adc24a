"""The command `slicetune`: its overview, its help, its errors; what the commands do is tested where they do it."""

import re
import runpy
import subprocess
import sys

import pytest

from slicetune.engine import commands
from slicetune.engine.common import distributed, signals
from slicetune.engine.common.errors import Exit, UserError, describe

QUESTIONS = "chosen overlap change ratios readings control silence awareness ranges projections transfer variants"


def said(capsys, *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line."""
    try:
        code = commands.main(words)
    except SystemExit as stop:
        code = stop.code or 0
    return code, *capsys.readouterr()


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_the_overview_has_a_line_a_command(words, capsys):
    code, out, _ = said(capsys, *words)
    assert code == 0
    for name in commands.COMMANDS:
        assert re.search(rf"^  {name} +[A-Z].*[^.]$", out, re.M), name


@pytest.mark.parametrize("name", [name for name in commands.COMMANDS if name != "ask"])
def test_help_opens_with_what_a_command_is_for_and_an_example(name, capsys):
    code, out, _ = said(capsys, name, "--help")
    assert code == 0
    usage, about, *_ = [part for part in out.split("\n\n") if part.strip()]
    assert usage.startswith(f"usage: slicetune {name}")
    assert len(about.split()) > 5
    assert re.search(rf"^ +(slicetune|torchrun --nproc_per_node 8 -m slicetune\.engine) {name}\b", out, re.M), out


def test_every_question_has_help_with_an_example(capsys):
    code, out, _ = said(capsys, "ask")
    assert code == 0
    assert re.findall(r"^  (\w+) +\S", out, re.M) == QUESTIONS.split()
    for name in QUESTIONS.split():
        code, out, _ = said(capsys, "ask", name, "--help")
        assert code == 0
        assert re.search(rf"^usage: slicetune ask {name} \[-h\] .*RUNS? ?…?", out, re.M), out
        assert f"    slicetune ask {name} runs/" in out, out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["scor"], "scor: no command: there are score select compare"),
        (["ask", "why", "runs/x"], "ask why: no question: there are chosen overlap"),
        (["ask", "chosen", "no/such/run"], "no/such/run/neurons.safetensors: no such file"),
        (["audit", "a", "b", "c"], "audit a b c: name RUN, or BASE RUN"),
        (["fold", "model", "out"], "--pair: say which, as in --pair de-en"),
        (["select", "--method", "full"], "--method full: chooses no neurons; there are"),
        (["select", "a.safetensors", "b.safetensors"], "name one statistics.safetensors"),
        (["score", "x.jsonl"], "--model.path is missing: name a Hugging Face folder"),
        (["score", "x.jsonl", "--score.reuse", "runs/x", "--model.path", "tiny"], "--score.reuse is of runs"),
        (["compare", "no_such_recipe"], "no_such_recipe: no such recipe"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(words, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = said(capsys, *words)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert line in err
    with pytest.raises(UserError):
        commands.main([*words, "--debug"])


@pytest.mark.parametrize(
    ("words", "notes"),
    [
        ("score x.jsonl", True),
        ("compare no_such_recipe", True),
        ("ask ratios x", True),
        ("ask readings x", True),
        ("ask variants x --k 2", True),
        ("ask silence x", False),
        ("ask control x", False),
        ("ask ranges x", False),
        ("ask chosen x", False),
        ("audit x", False),
        ("delta apply x y z", False),
        ("doctor x", False),
    ],
)
def test_a_signal_is_noted_only_where_a_boundary_looks_for_it(words, notes, monkeypatch, tmp_path):
    """Ctrl-C and SIGTERM end any other command at once; noted, they would do nothing."""

    def start():
        raise UserError("far enough")

    noted = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signals, "install", lambda: noted.append(True))
    monkeypatch.setattr(distributed, "start", start)
    with pytest.raises(SystemExit):
        commands.main(words.split())
    assert bool(noted) == notes


def test_an_unknown_flag_is_explained(capsys):
    code, _, err = said(capsys, "delta", "apply", "a", "b", "c", "--fast")
    assert code == 2
    assert "--fast" in err


def test_a_library_that_is_missing_is_named_with_the_extra_that_brings_it():
    for name, extra in (("transformers.models", "engine"), ("wandb", "wandb"), ("flash_attn", "flash")):
        error = ModuleNotFoundError(f"No module named {name!r}", name=name)
        root = name.partition(".")[0]
        assert describe(error) == (Exit.WRONG, f"{root} is not installed: pip install 'slicetune[{extra}]'")
    assert describe(ModuleNotFoundError("No module named 'ours'", name="ours"))[0] is Exit.FAILED


def test_python_m_is_the_same_command(tmp_path):
    command = [sys.executable, "-m", "slicetune.engine", "audit", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}: no run's folder, so its base is not known: give BASE RUN\n"


def test_a_question_that_was_a_command_once_says_how_it_is_asked_now(tmp_path):
    command = [sys.executable, "-m", "slicetune.engine.analyses.chosen", "runs/x"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "error: a question is asked by the command: slicetune ask QUESTION RUN\n"


@pytest.mark.parametrize("name", ["score", "select", "doctor"])
def test_a_module_that_was_a_command_once_still_is(name, monkeypatch, tmp_path, capsys):
    """A script that calls it must not be told that all is well while nothing was done."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "none", "--fast"])
    monkeypatch.delitem(sys.modules, f"slicetune.engine.{name}", raising=False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"slicetune.engine.{name}", run_name="__main__")
    assert stop.value.code == 2
    assert "--fast" in capsys.readouterr().err
