"""The launcher's variables: torchrun's whole, or none; and what torchrun's summary says of an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from slicetune.engine.common import launcher
from slicetune.engine.common.command import one_line
from slicetune.engine.common.errors import UserError

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "29500"}
REFUSED = [
    (
        {"OMPI_COMM_WORLD_LOCAL_RANK": "1"},
        "OMPI_COMM_WORLD_LOCAL_RANK=1 without RANK.*env -u OMPI_COMM_WORLD_LOCAL_RANK",
    ),
    ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "2 processes were started.*torchrun"),
    ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS=4.*one --out.*torchrun"),
    ({"SLURM_PROCID": "1"}, "SLURM_PROCID=1 without RANK"),
    ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "PMI_SIZE=2"),
    ({"PMIX_RANK": "3"}, "PMIX_RANK=3"),
    (
        {"RANK": "0", "WORLD_SIZE": "1"},
        "RANK=0 WORLD_SIZE=1 is set, but not LOCAL_RANK MASTER_ADDR MASTER_PORT.*env -u RANK",
    ),
    ({"RANK": "0"}, "RANK=0 is set, but not WORLD_SIZE"),
    ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set, but not RANK"),
    (TORCHRUN | {"RANK": "one"}, "RANK='one': not a number"),
    (TORCHRUN | {"WORLD_SIZE": "1"}, "ranks count from 0"),
    (TORCHRUN | {"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1': not a number"),
    (TORCHRUN | {"MASTER_PORT": "port"}, "MASTER_PORT='port': not a number"),
    ({"PMI_SIZE": ""}, "PMI_SIZE='': not a number"),
]


@pytest.mark.parametrize(("given", "words"), REFUSED)
def test_what_makes_no_job_is_one_line_with_the_remedy(given, words):
    with pytest.raises(UserError, match=words):
        launcher.check(dict(given))


TAKEN = [{}, TORCHRUN, {"MASTER_ADDR": "h", "MASTER_PORT": "1"}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}]
TAKEN += [
    {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
    {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
]


@pytest.mark.parametrize("given", TAKEN)
def test_one_process_alone_and_torchruns_are_taken(given):
    environment = dict(given)
    launcher.check(environment)
    assert environment == given


def test_an_mpirun_that_started_torchrun_does_not_contradict_it():
    """DeepSpeed asserts that its local rank is torchrun's."""
    environment = TORCHRUN | {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
    launcher.check(environment)
    assert environment == TORCHRUN | {"OMPI_COMM_WORLD_SIZE": "2"}


def test_a_command_says_it_before_anything_reads_the_variables(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(SystemExit) as stop, one_line():
        raise AssertionError("never reached")
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: RANK=one is set, but not WORLD_SIZE")
    assert said.count("\n") == 1


FAILS = """
from slicetune.engine.common.command import one_line
from slicetune.engine.common.errors import UserError
with one_line():
    raise UserError("data/it/train.jsonl: empty: fill it", agreed=True)
"""


def test_torchruns_summary_which_comes_last_has_the_line(tmp_path):
    (program := tmp_path / "fails.py").write_text(FAILS)
    words = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1
    last = done.stderr.split("Root Cause")[1]
    assert "error: data/it/train.jsonl: empty: fill it" in last
    assert "Traceback" not in last


def test_a_misspelt_flag_stands_there_too(tmp_path, monkeypatch):
    from dataclasses import dataclass

    from slicetune.engine.common.command import parse

    @dataclass
    class Words:
        size: int = 1

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit):
        parse(Words, ["--sise", "2"], "")
    assert "--sise" in json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    assert os.environ["TORCHELASTIC_ERROR_FILE"]
