"""How a program speaks: in any encoding, and how far it is in a log."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from jobs import ROOT

from slicetune.engine.common import output


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(monkeypatch, capsys, seconds: float) -> list[str]:
    """What a log has of ten batches of ten, one every `seconds`."""
    clock = iter(range(100))
    monkeypatch.setattr(output.time, "monotonic", lambda: seconds * next(clock))
    with output.Bar("score", 95, "sentence") as bar:
        bar.tell("loss 1.250")
        for _ in range(10):
            bar.add(10)
    return capsys.readouterr().out.splitlines()


def test_a_log_gets_a_plain_line_every_half_minute(monkeypatch, capsys):
    found = lines(monkeypatch, capsys, 15)
    assert len(found) == 6
    assert found[0] == "score: 20 of 95 sentences, 0.667 a second, 01:52 left, loss 1.250"
    assert found[-1] == "score: 95 of 95 sentences, 0.576 a second, in 02:45, loss 1.250"
    assert "\r" not in "".join(found)


def test_what_is_soon_done_is_one_line(monkeypatch, capsys):
    assert len(lines(monkeypatch, capsys, 1)) == 1


def test_other_ranks_are_silent(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert not lines(monkeypatch, capsys, 100)


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stdout", screen := Terminal())
    with output.Bar("score", 10, "sentence") as bar:
        bar.add(12)
        bar.write("a line")
    assert "\r" in screen.getvalue()
    assert "10/10" in screen.getvalue()


PRINTS = "print('⟦ä'); import sys; print('Größe', file=sys.stderr)"


@pytest.mark.parametrize("variables", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}])
def test_output_ends_no_run(variables):
    """A command whose help and messages have characters that ASCII lacks."""
    program = f"from slicetune.engine.common.command import one_line\nwith one_line(): exec({PRINTS!r})"
    for words in (["-c", program], [str(ROOT / "recipes/caneft_tiny.py"), "--dry-run", "--help"]):
        done = subprocess.run(
            [sys.executable, "-P", *words],
            env=_environment() | variables,
            capture_output=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout


def _environment() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if name != "PYTHONUTF8"}
