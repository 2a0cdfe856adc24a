"""Triton's interpreter runs the kernels themselves on a CPU: every interpret_*.py beside this file, in one process.

TRITON_INTERPRET must be set before a kernel module is imported, so these checks cannot share a process with the
ahead-of-time ones. By hand: TRITON_INTERPRET=1 pytest tests/kernels/interpret_gated.py
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def test_kernels_in_the_interpreter():
    files = sorted(pathlib.Path(__file__).parent.glob("interpret_*.py"))
    assert files
    environment = {**os.environ, "TRITON_INTERPRET": "1", "SLICETUNE_KERNELS": "triton", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, files)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-12000:] + run.stderr[-4000:]
    assert re.search(r"\b\d+ passed", run.stdout), run.stdout
    assert "skipped" not in run.stdout, run.stdout
