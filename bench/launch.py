"""The processes of a run: what they import, when they end, and their rows on disk while they run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
PEERS = {"cpu": "with", "gpu": "without", "gpu-record": "without", "gpu-peers": "only"}
WORKERS = 10
"""Of the kernel tests: nearly all of their time is the compiler's."""
MARGIN = 5.0
"""A suite is asked to be done this long before it is stopped."""
Result = dict[str, Any]


def environment(mode: str, links: Path) -> dict[str, str]:
    """Variables of the children: where slicetune is, which contenders, and no network."""
    package = links / "slicetune"
    package.mkdir()
    for name in ("engine", "kernels", "recipes"):
        (package / name).symlink_to(ROOT / name, target_is_directory=True)
    cpu = mode == "cpu"
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if cpu else {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    path = os.pathsep.join(filter(None, (str(links), os.environ.get("PYTHONPATH", ""))))
    quiet = {"KINETO_LOG_LEVEL": "99", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DS_ACCELERATOR": "cpu" if cpu else "cuda"}
    peers = PEERS.get(mode, "with")
    return {**os.environ, **hidden, **quiet, **offline, "PYTHONPATH": path, "SLICETUNE_BENCH_PEERS": peers}


def links_of(env: dict[str, str]) -> Path:
    """The temporary folder of this run."""
    return Path(env["PYTHONPATH"].split(os.pathsep)[0])


def unpack(wheels: Path, env: dict[str, str]) -> str:
    """Unpack every wheel of a folder into the run's own, and put that on the path; what went wrong, in a line.

    Dependencies are not looked for: pip would want torch itself among the wheels, for what is installed does not count
    where --target is another folder.
    """
    files = sorted(str(file) for file in wheels.glob("*.whl"))
    if not files:
        return f"no *.whl in {wheels}"
    target = links_of(env) / "wheels"
    options = ["--no-index", "--find-links", str(wheels), "--no-deps", "--target", str(target)]
    done = subprocess.run([sys.executable, "-m", "pip", "install", *options, *files], capture_output=True, text=True)
    env["PYTHONPATH"] += os.pathsep + str(target)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["pip failed"])[-1][:200]


def watched(
    command: Sequence[str], env: dict[str, str], seconds: float, log: Path, tick: Callable[[], Any] = lambda: None
) -> str:
    """Run a command, its output at the end of `log`; `tick` is called every second. "" or what went wrong."""
    end = time.monotonic() + seconds
    with log.open("a") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)
        try:
            while True:
                try:
                    code = process.wait(min(1.0, max(0.01, end - time.monotonic())))
                    return "" if code == 0 else f"exit code {code}"
                except subprocess.TimeoutExpired:
                    tick()
                if time.monotonic() > end:
                    return f"stopped after {seconds:.0f} s"
        finally:
            process.kill()
            process.wait()
            tick()


def pytest(
    paths: Sequence[str],
    env: dict[str, str],
    seconds: float,
    log: Path,
    tick: Callable[[], Any] = lambda: None,
    options: Sequence[str] = (),
) -> str:
    """pytest over files of bench/, or tests in them, in a process of its own."""
    # -P: the checkout itself must not be on the path, where its `kernels` would pass for Hugging Face's.
    command = [sys.executable, "-P", "-m", "pytest", "-W", "ignore", "-p", "no:cacheprovider", "--tb=short", *options]
    until = {"SLICETUNE_BENCH_UNTIL": str(time.time() + max(0.0, seconds - MARGIN))}
    return watched([*command, *(str(BENCH / path) for path in paths)], env | until, seconds, log, tick)


def measure(
    paths: Sequence[str], env: dict[str, str], seconds: float, log: Path, keep: Callable[[Result], Any]
) -> Result:
    """One process over benchmarks: {"rows", "provenance", "failure", "seconds"}; `keep` gets it whenever it grows."""
    started = time.monotonic()
    file = links_of(env) / f"rows-{time.monotonic_ns()}.jsonl"

    def result(failure: str) -> Result:
        return {**rows_of(file), "failure": failure, "seconds": round(time.monotonic() - started)}

    size = 0

    def tick() -> None:
        nonlocal size
        now = file.stat().st_size if file.is_file() else 0
        if now > size:
            size = now
            keep(result("broken off"))

    options = ("-s", "--benchmark-quiet", "--benchmark-disable-gc")
    failure = pytest(paths, {**env, "SLICETUNE_BENCH_ROWS": str(file)}, seconds, log, tick, options)
    return result(failure)


def rows_of(file: Path) -> Result:
    """The rows that a process has left, the last line of each; a line that it was writing when it ended is not one."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    about: dict[str, Any] = {}
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        row, about = found["row"], found["provenance"]
        rows[row["suite"], row["setting"], row["name"]] = row
    return {"rows": list(rows.values()), "provenance": about}


def kernel_tests(env: dict[str, str], seconds: float, log: Path) -> str:
    """The kernels compiled for this GPU against float64; "" or what failed."""
    workers = min(WORKERS, os.cpu_count() or 1)
    options = ("-n", str(workers), "--dist", "worksteal", "-p", "no:benchmark")
    return pytest(["gpu_kernels.py"], env, seconds, log, options=options)


def save(results: Path, mode: str, found: dict[str, Result], tests: dict[str, str]) -> Path:
    """Put the suites' results beside those that earlier runs left for this device; returns the JSON's path."""
    mode = "gpu" if mode == "gpu-record" else mode
    provenance = next((each["provenance"] for each in found.values() if each["provenance"]), {})
    device = re.sub(r"[^a-z0-9]+", "-", provenance.get("device", "gpu").lower().removeprefix("nvidia")).strip("-")
    path = results / f"{'cpu' if mode == 'cpu' else f'{mode}-{device}'}.json"
    results.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text()) if path.is_file() else {}
    files = {**old.get("files", {}), **found}
    whole = {"mode": mode, "tests": tests or old.get("tests", {}), "files": files}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    partial.replace(path)  # a run that is killed leaves a whole file
    return path
