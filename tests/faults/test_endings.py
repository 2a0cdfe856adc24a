"""How commands end: exit codes, one line, status.json; the lock; the first of several errors."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys

import pytest
from jobs import ROOT
from safetensors import SafetensorError

from slicetune.engine.common import command as command_module
from slicetune.engine.common import distributed, signals
from slicetune.engine.common.errors import Exit, Interrupted, UserError
from slicetune.engine.data.config import DataConfig
from slicetune.engine.models import load as models
from slicetune.engine.run import status
from slicetune.engine.run.config import RunConfig
from slicetune.engine.run.job import Job
from slicetune.engine.run.stages import Lock, Stages

ENDINGS = [
    (UserError("a.json: wrong:\nmend it"), Exit.WRONG, "a.json: wrong: mend it"),
    (Interrupted("interrupted by a signal"), Exit.INTERRUPTED, "interrupted by a signal"),
    (KeyboardInterrupt(), Exit.INTERRUPTED, "interrupted by SIGINT"),
    (OSError(errno.ENOSPC, "x", "out/a"), Exit.WRONG, "out/a: No space left on device: make room"),
    (SafetensorError("I/O error: File too large (os error 27)"), Exit.WRONG, "--out: File too large: make room"),
    (RuntimeError("CUDA out of memory. Tried 2 GiB"), Exit.FAILED, "a smaller --train.micro-batch-size"),
    (RuntimeError("[gloo/tcp/pair.cc] Connection closed by peer [::1]"), Exit.FAILED, "another rank has ended"),
    (KeyError("x"), Exit.FAILED, "KeyError"),
]


@pytest.mark.parametrize(("error", "code", "words"), ENDINGS)
def test_every_error_has_a_code_and_a_line(error, code, words, capsys, tmp_path):
    distributed.first(lambda: None)
    with pytest.raises(SystemExit) as stop, command_module.one_line(), status.recorded(tmp_path):
        raise error
    assert stop.value.code == code
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert words in said
    assert said.count("\n") == 1
    recorded = status.read(tmp_path)
    assert (recorded["exit_code"], words in recorded["message"]) == (code, True)
    assert recorded["state"] == ("interrupted" if code == Exit.INTERRUPTED else "failed")


def test_debug_shows_the_traceback():
    with pytest.raises(UserError), command_module.one_line(debug=True):
        raise UserError("x")


def test_work_that_ends_well_is_complete(tmp_path):
    with status.recorded(tmp_path):
        assert status.read(tmp_path)["state"] == "running"
    assert status.read(tmp_path)["state"] == "complete"


def test_the_first_error_of_several_ranks_is_kept(tmp_path):
    def work():
        (tmp_path / status.NAME).write_text(json.dumps({"state": "failed", "message": "rank 1 was first"}))
        raise KeyError("rank 0 after it")

    with pytest.raises(KeyError), status.recorded(tmp_path):
        work()
    assert status.read(tmp_path)["message"] == "rank 1 was first"


def test_a_signal_is_noted_and_raised_at_the_boundary(capfd):
    before = {number: signal.getsignal(number) for number in signals.WATCHED}
    try:
        signals.install()
        signals.boundary("doing this")
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted, match="while doing this"):
            signals.boundary("doing this")
        assert capfd.readouterr().err.count("stopping at the next boundary") == 1
    finally:
        signals.forget()
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_second_run_in_one_folder_is_refused_and_leaves_the_first_ones_status(tmp_path):
    lock = Lock(tmp_path)
    (tmp_path / status.NAME).write_text('{"state": "running"}')
    command = [sys.executable, str(ROOT / "recipes/caneft_tiny.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == Exit.WRONG
    assert "another run writes here (host" in done.stderr
    assert done.stderr.count("\n") == 1
    assert status.read(tmp_path) == {"state": "running"}
    assert lock.file


def test_data_is_looked_at_before_any_model(tmp_path, monkeypatch):
    def fetched(path):
        raise AssertionError("a model was looked for")

    monkeypatch.setattr(models, "snapshot", fetched)
    (tmp_path / "de-en" / "it").mkdir(parents=True)
    data = DataConfig(dir=str(tmp_path), seen=("it",), unseen=())
    with pytest.raises(UserError, match=r"it/train|it.*train"):
        Job(RunConfig(out=str(tmp_path / "out"), data=data))


def test_an_out_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Lock(tmp_path / "file" / "out")


def test_a_damaged_record_of_stages_is_named(tmp_path):
    (tmp_path / "stages.json").write_text("{")
    with pytest.raises(UserError, match=r"stages\.json: not a record"):
        Stages(tmp_path)


def test_a_job_whose_results_are_whole_ends_with_0_every_time():
    """No thread of a process group is left that wants Python's lock while the interpreter ends."""
    command = [sys.executable, str(ROOT / "tests/faults/endings.py"), "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    lines = done.stdout.splitlines()
    assert "threads python" in lines, done.stdout + done.stderr[-2000:]
    assert [line for line in lines if line.startswith("codes")] == ["codes 0 0"] * 5, done.stderr[-2000:]
