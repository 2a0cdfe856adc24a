"""Every benchmark runs through at tiny shapes, nothing of it fails, and the report says what was measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    ours = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}  # a worker's child would keep its rows
    environment = {**ours, "SLICETUNE_BENCH": "smoke", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCH / "run.py"), "cpu", "--out", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def rows(out) -> list[dict]:
    files = json.loads((out / "results" / "cpu.json").read_text())["files"]
    assert [file["failure"] for file in files.values()] == [""]
    return [row for file in files.values() for row in file["rows"]]


def test_every_contender_was_measured(rows):
    assert {row["name"]: row["error"] for row in rows if "error" in row} == {}
    assert all(0 < row["low"] <= row["seconds"] <= row["high"] for row in rows)
    suites = {row["suite"] for row in rows}
    assert {"step", "scoring", "selection", "SwiGLU backward", "AdamW over slices", "24 GB"} <= suites


def test_memory_of_methods_is_in_the_order_that_it_must_be(rows):
    found = {row["name"]: row for row in rows if row["suite"] == "step"}
    ours, full = found["slices 1 %"], found["full, fused AdamW"]
    assert ours["optimizer_bytes"] < full["optimizer_bytes"]
    assert full["optimizer_bytes"] >= 8 * full["trainable"]  # two float32 moments
    assert ours["peak_bytes"] < full["peak_bytes"]
    assert ours["saved_bytes"] <= full["saved_bytes"]
    assert found["floor: forward + dX, frozen"]["optimizer_bytes"] == 0


def test_report(out):
    text = (out / "RESULTS.md").read_text()
    assert "A smoke run" in text
    assert "slices ≤ 1.10 × the floor" in text
    assert text.count("not measured: none was at hand") > 5  # a GPU's targets stay open: no number stands in for them
    assert "not measured: no row" not in text
    images = [line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert len(images) == 3
    assert all((out / image).stat().st_size > 1000 for image in images)


TUNE = """
import time, triton.testing, tune
triton.testing.do_bench = lambda run, **options: (run(), [1.0])[1]
for number, table in enumerate(tune.tables()):
    pins, configs = dict(table.pins), table.candidates("sm_90")
    assert configs[0] == table.pinned("sm_90") and len(configs) > 8
    rows = list(tune.measured(table, configs[:2], "sm_90", time.monotonic() + 600))
    assert [row.get("error") for row in rows] == [None, None], rows
    assert table.pins == pins
    assert table.compiled(configs[1], "sm_90").constexprs != table.compiled(configs[0], "sm_90").constexprs
wrong = lambda: (lambda: None, lambda got: [(tune.inputs()[0], tune.inputs()[1], 1e-3)])
(row,) = tune.measured(tune.dataclasses.replace(table, make=wrong), configs[:1], "sm_90", time.monotonic() + 600)
assert "relative error" in row["error"] and "seconds" not in row
assert tune.verdict(1, tune.tables()[1].pinned("sm_90"), "sm_90") == ""
assert "spills" in tune.verdict(1, tune.Tile(64, 64, 512, 4), "sm_90")
"""


def test_tuning_checks_what_it_times_and_drops_what_spills():
    """The same code as on a GPU, with the clock and the kernels' parts exchanged; two real compilations."""
    pytest.importorskip("triton")
    environment = {**os.environ, "SLICETUNE_BENCH": "smoke", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(BENCH), os.environ.get("PYTHONPATH", ""))))
    done = subprocess.run([sys.executable, "-c", TUNE], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


BARE = """
import sys
missing = "tyro datasets deepspeed einops hjson matplotlib msgpack ninja pydantic scipy sentencepiece tensorboard"
sys.modules |= dict.fromkeys(missing.split())  # importing one of them fails
import bench_kernels, bench_optimizer, bench_scoring, bench_step, gpu_kernels, run, tune
assert run.GPU_FILES == ("bench_kernels.py", "bench_optimizer.py", "bench_step.py", "bench_scoring.py")
"""


def test_a_gpu_machine_needs_no_more_than_the_makefile_says():
    environment = {**os.environ, "SLICETUNE_BENCH": "smoke"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(BENCH), os.environ.get("PYTHONPATH", ""))))
    done = subprocess.run([sys.executable, "-c", BARE], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
