"""Every benchmark runs through at tiny shapes, and the commands keep their promises. Next: test_bench_checks.py."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
SUITES = "kernels optimizer packed padded methods memory scoring selection"


@pytest.fixture
def bench(monkeypatch) -> None:
    """The benchmarks' modules can be imported."""
    monkeypatch.syspath_prepend(BENCH)


def environment(**more: str) -> dict[str, str]:
    ours = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}  # a worker's child would keep its rows
    return {**ours, "SLICETUNE_BENCH": "smoke", "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> tuple[Path, str]:
    """The folder and the output of a run of all suites."""
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, str(BENCH / "run.py"), "--out", str(folder), "cpu", "--plots", *SUITES.split()]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=500)
    log = folder / "cpu.log"
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:] + log.read_text()[-3000:]
    return folder, done.stdout


@pytest.fixture(scope="module")
def out(smoke) -> Path:
    return smoke[0]


@pytest.fixture(scope="module")
def rows(out) -> list[dict]:
    files = json.loads((out / "results" / "cpu.json").read_text())["files"]
    assert [file["failure"] for file in files.values()] == [""]
    return [row for file in files.values() for row in file["rows"]]


def test_every_contender_was_measured(rows):
    assert {row["name"]: row["error"] for row in rows if "error" in row} == {}
    assert all(0 < row["low"] <= row["seconds"] <= row["high"] for row in rows)
    suites = {row["suite"] for row in rows}
    assert {"step", "whole step", "scoring", "selection", "SwiGLU backward", "AdamW over slices", "24 GB"} <= suites
    forms = {(row["form"], row["name"].endswith("compiled")) for row in rows if row["suite"] == "whole step"}
    assert forms >= {("packed", True), ("packed", False), ("padded", False)}


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


def test_what_a_run_prints_and_leaves_fits_what_a_lent_machine_gives_back(smoke):
    folder, output = smoke
    assert len(output) < 12_000
    assert "[SwiGLU backward]" in output
    assert "[targets]" in output
    assert "[targets]" in output[-4500:]
    assert len([path for path in folder.rglob("*") if path.is_file()]) <= 8


def test_a_run_that_is_killed_leaves_the_rows_that_it_had(tmp_path):
    command = [sys.executable, str(BENCH / "run.py"), "cpu", "optimizer", "packed", "--out", str(tmp_path)]
    file = tmp_path / "results" / "cpu.json"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen(command, env=environment(), **quiet)
    try:
        while process.poll() is None and not file.is_file():
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    (found,) = json.loads(file.read_text())["files"].values()
    assert found["failure"] == "broken off"
    assert found["rows"][0]["seconds"] > 0
    assert found["provenance"]["versions"]["torch"]


def test_a_row_that_was_being_written_is_not_one_and_the_last_line_counts(bench, tmp_path):
    import launch

    file = tmp_path / "rows.jsonl"
    row = {"suite": "s", "setting": "x", "name": "n", "seconds": 2.0}
    lines = [{"row": row, "provenance": {}}, {"row": row | {"seconds": 1.0}, "provenance": {"device": "cpu"}}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"row": {"suite": "s", "sett')
    assert launch.rows_of(file) == {"rows": [row | {"seconds": 1.0}], "provenance": {"device": "cpu"}}
    result = {"rows": [row], "provenance": {"device": "NVIDIA H100 80GB HBM3"}, "failure": "", "seconds": 1}
    path = launch.save(tmp_path, "gpu", {"kernels": result}, {"t": "passed"})
    assert launch.save(tmp_path, "gpu-record", {"packed": result}, {}) == path == tmp_path / "gpu-h100-80gb-hbm3.json"
    whole = json.loads(path.read_text())
    assert (whole["mode"], whole["tests"], list(whole["files"])) == ("gpu", {"t": "passed"}, ["kernels", "packed"])


def test_a_recipe_starts_from_a_checkout_that_is_not_installed(bench, tmp_path, monkeypatch):
    import launch
    import recipe

    # -S: no .pth file is read, so that an editable installation is not seen
    monkeypatch.setenv("PYTHONPATH", str(Path(pytest.__file__).parents[1]))
    command = [sys.executable, "-S", "-P", recipe.RECIPE, "--dry-run"]
    env = launch.environment("cpu", tmp_path)
    done = subprocess.run(command, cwd=launch.ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "while scoring" in done.stdout


def test_without_matplotlib_there_are_no_plots_and_one_line_says_so(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it fails
    import plots

    plots.has_matplotlib.cache_clear()
    assert plots.draw("a", [], tmp_path) == plots.draw("b", [], tmp_path) == []
    assert capsys.readouterr().err.count("pip install 'slicetune[bench]'") == 1
    plots.has_matplotlib.cache_clear()


def test_a_child_ends_when_its_time_is_over(bench, tmp_path):
    import launch

    command, ticks = [sys.executable, "-c", "print('begun', flush=True); import time; time.sleep(600)"], []
    how = launch.watched(command, dict(os.environ), 0.5, tmp_path / "log", lambda: ticks.append(1))
    assert how.startswith("stopped after")
    assert ticks
    assert launch.watched([sys.executable, "-c", "exit(3)"], dict(os.environ), 60, tmp_path / "log") == "exit code 3"


def test_plan(bench):
    import plan
    from plan import RESERVE, SECONDS, Suite, shares

    core = {"gpu": "tests kernels optimizer packed", "gpu-record": "kernels optimizer packed memory methods"}
    for mode, suites in plan.SUITES.items():
        given = shares(suites, SECONDS[mode])
        assert sum(given) + RESERVE <= SECONDS[mode]
        full = [suite.name for suite, share in zip(suites, given, strict=True) if share == suite.want]
        assert full[: len(core[mode].split())] == core[mode].split() if mode in core else len(full) == len(suites)
    assert SECONDS["gpu"] <= 240
    assert max(SECONDS[mode] for mode in SECONDS if mode != "cpu") <= 280
    a, b, c = Suite("a", 30, 20), Suite("b", 50, 40), Suite("c", 10, 5)
    assert shares([a, b, c], RESERVE + 90) == [30, 50, 10]
    assert shares([a, b, c], RESERVE + 75) == [30, 45, 0]
    assert shares([a, b, c], RESERVE + 45) == [30, 0, 10]  # a smaller one still fits
    assert shares([a, b, c], RESERVE + 25) == [25, 0, 0]
    assert shares([a, b, c], 0) == [0, 0, 0]


def test_what_has_no_time_is_named(tmp_path):
    command = [sys.executable, str(BENCH / "run.py"), "cpu", "--seconds", "2", "--out", str(tmp_path)]
    variables = {k: v for k, v in environment().items() if k != "SLICETUNE_BENCH"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1].endswith(
        "left out for want of time: kernels optimizer packed padded methods scoring selection"
    )
    assert "not measured" in (tmp_path / "RESULTS.md").read_text()


def test_flags_come_in_any_order(bench, capsys):
    from run import arguments

    orders = ("--out x cpu bench_step.py", "cpu --out x bench_step.py", "cpu bench/bench_step.py --out x")
    found = [arguments(order.split()) for order in orders]
    assert [[suite.name for suite in each.suites] for each in found] == [["methods"]] * 3
    assert {each.out for each in found} == {Path("x").resolve()}
    assert arguments(["gpu", "--seconds", "100", "packed"]).seconds == 100
    assert arguments(["gpu"]).seconds == 240
    assert [suite.name for suite in arguments(["gpu", "bench_forms.py"]).suites] == ["packed", "equal", "padded"]
    with pytest.raises(SystemExit):
        arguments(["gpu", "bench_nothing.py"])
    assert "no suite bench_nothing.py" in capsys.readouterr().err


def gpu_run(tmp_path: Path, **variables: str) -> tuple[int, str]:
    command = [sys.executable, str(BENCH / "run.py"), "gpu-run", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout


def test_a_recipe_without_its_wheels_says_what_is_missing(tmp_path):
    (tmp_path / "tyro.py").write_text("raise ImportError('No module named tyro')")
    code, text = gpu_run(tmp_path, PYTHONPATH=str(tmp_path))
    assert (code, text) == (1, "[gpu-run] missing: tyro: No module named tyro (WHEELS=DIR: a folder of *.whl)\n")
    code, text = gpu_run(tmp_path, WHEELS=str(tmp_path))
    assert (code, text) == (1, f"[gpu-run] WHEELS={tmp_path}: no *.whl in {tmp_path}\n")


def test_wheels_are_unpacked_without_a_network(bench, tmp_path):
    import launch

    with zipfile.ZipFile(tmp_path / "ours-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("ours.py", "VALUE = 7\n")
        wheel.writestr("ours-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: ours\nVersion: 1.0\n")
        wheel.writestr("ours-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("ours-1.0.dist-info/RECORD", "")
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "links")}
    assert launch.unpack(tmp_path, env) == ""
    done = subprocess.run([sys.executable, "-c", "import ours; print(ours.VALUE)"], env=env, capture_output=True)
    assert done.stdout == b"7\n"


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
assert "spills" in tune.verdict(1, tune.Tile(256, 16, 256, 4), "sm_90")
programs = {(c.width, c.programs) for c in tune.products(143, 4096)}
assert programs == {(128, 132), (128, 128), (256, 132), (256, 128)}, programs  # 64 or 32 tiles, whole times
"""


def test_tuning_checks_what_it_times_and_drops_what_spills():
    """The same code as on a GPU, with the clock and the kernels' parts exchanged; two real compilations."""
    pytest.importorskip("triton")
    path = os.pathsep.join(filter(None, (str(BENCH), os.environ.get("PYTHONPATH", ""))))
    command = [sys.executable, "-c", TUNE]
    done = subprocess.run(command, env=environment(PYTHONPATH=path), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


BARE = """
import sys
missing = "tyro datasets deepspeed einops hjson matplotlib msgpack ninja pydantic scipy sentencepiece tensorboard"
sys.modules |= dict.fromkeys(missing.split())  # importing one of them fails
import bench_forms, bench_kernels, bench_memory, bench_optimizer, bench_products, bench_scoring, bench_step
import gpu_kernels, plan, recipe, report, run, screen, tune
files = {path.split("::")[0] for mode in plan.SUITES if mode != "cpu" for s in plan.SUITES[mode] for path in s.paths}
assert {file.removesuffix(".py") for file in files} <= set(sys.modules), files
"""


def test_a_gpu_machine_needs_no_more_than_the_makefile_says():
    path = os.pathsep.join(filter(None, (str(BENCH), os.environ.get("PYTHONPATH", ""))))
    command = [sys.executable, "-c", BARE]
    done = subprocess.run(command, env=environment(PYTHONPATH=path), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
