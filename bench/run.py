"""Run the benchmarks, one file a process, and write bench/results/*.json and bench/RESULTS.md.

    python bench/run.py cpu                         # make bench
    python bench/run.py gpu                         # make gpu: kernel tests compiled for real, then the benchmarks
    python bench/run.py gpu-peers                   # make gpu-peers: torch.compile, Liger, DoRA, SHiRA
    python bench/run.py cpu bench_step.py           # one file; the others' results stay
    python bench/run.py tune                        # make tune: bench/tune.py, which tiles are best on this GPU

Works from a plain checkout with nothing installed: slicetune.engine and slicetune.kernels are made importable for
this run by links in a temporary folder. What fails or is too slow is reported and does not stop the rest.
SLICETUNE_COMMIT names the commit where there is no git.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
GPU_FILES = ("bench_kernels.py", "bench_optimizer.py", "bench_step.py", "bench_scoring.py")
FILES = {
    "cpu": (*GPU_FILES, "bench_selection.py"),  # selection works on the host
    "gpu": GPU_FILES,
    "gpu-peers": ("bench_kernels.py", "bench_step.py"),
}
LIMIT = {"cpu": 600, "gpu": 180, "gpu-peers": 300}
"""Seconds after which one file is stopped …"""
WHOLE = {"cpu": 1500, "gpu": 460, "gpu-peers": 460}
"""… and all of them: a GPU command must end within 8 minutes."""


def environment(mode: str, links: Path) -> dict[str, str]:
    """Variables of the children: where slicetune is, which contenders, and no network."""
    package = links / "slicetune"
    package.mkdir()
    for name in ("engine", "kernels"):
        (package / name).symlink_to(ROOT / name, target_is_directory=True)
    peers = {"cpu": "with", "gpu": "without", "gpu-peers": "only"}[mode]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if mode == "cpu" else {}
    path = os.pathsep.join(filter(None, (str(links), os.environ.get("PYTHONPATH", ""))))
    quiet = {"KINETO_LOG_LEVEL": "99", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DS_ACCELERATOR": "cpu" if mode == "cpu" else "cuda"}
    return {**os.environ, **hidden, **quiet, **offline, "PYTHONPATH": path, "SLICETUNE_BENCH_PEERS": peers}


def pytest(arguments: list[str], env: dict[str, str], limit: float) -> str:
    """Run pytest in a process of its own; an empty string or what went wrong."""
    # -P: the checkout itself must not be on the path, where its `kernels` would pass for Hugging Face's.
    command = [sys.executable, "-P", "-m", "pytest", "-s", "-W", "ignore", "-p", "no:cacheprovider", *arguments]
    try:
        code = subprocess.run(command, cwd=ROOT, env=env, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    return "" if code == 0 else f"exit code {code}"


def measure(files: str, env: dict[str, str], limit: float) -> dict[str, Any]:
    """One process over one benchmark file, or several: {"rows", "provenance", "failure", "seconds"}."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out, early = Path(folder) / "benchmark.json", Path(folder) / "rows.jsonl"
        paths = [str(BENCH / file) for file in files.split()]
        arguments = [*paths, f"--benchmark-json={out}", "--benchmark-quiet", "--benchmark-disable-gc"]
        failure = pytest(arguments, {**env, "SLICETUNE_BENCH_ROWS": str(early)}, limit)
        try:
            data = json.loads(out.read_text())
            found = [
                {**each["extra_info"], "provenance": data["machine_info"]["slicetune"]} for each in data["benchmarks"]
            ]
        except (OSError, ValueError, KeyError):  # stopped: what it had measured by then
            found = [json.loads(line) for line in early.read_text().splitlines()] if early.is_file() else []
    rows = [row for each in found for row in each.get("rows", [])]
    about = found[0]["provenance"] if found else {}
    return {"rows": rows, "provenance": about, "failure": failure, "seconds": round(time.monotonic() - started)}


def save(results: Path, mode: str, found: dict[str, dict[str, Any]], tests: dict[str, str]) -> Path:
    """Put the files' results beside those that earlier runs left for this device; returns the JSON's path."""
    provenance = next((each["provenance"] for each in found.values() if each["provenance"]), {})
    device = re.sub(r"[^a-z0-9]+", "-", provenance.get("device", "gpu").lower().removeprefix("nvidia")).strip("-")
    path = results / f"{'cpu' if mode == 'cpu' else f'{mode}-{device}'}.json"
    results.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text()) if path.is_file() else {}
    files = {**old.get("files", {}), **found}
    whole = {"mode": mode, "tests": tests or old.get("tests", {}), "files": files}
    path.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    return path


def kernel_tests(env: dict[str, str]) -> dict[str, str]:
    """The kernels compiled for this GPU against float64."""
    failed = pytest([str(BENCH / "gpu_kernels.py"), "--benchmark-disable"], env, 150)
    print(f"[gpu] kernels compiled for this GPU: {failed or 'passed'}", flush=True)
    return {"kernels compiled for this GPU": failed or "passed"}


def tune(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as links:
        env = environment("gpu", Path(links))
        return subprocess.run([sys.executable, str(BENCH / "tune.py"), *arguments], env=env).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=("cpu", "gpu", "gpu-peers", "tune"))
    parser.add_argument("files", nargs="*", help="benchmark files; all by default")
    parser.add_argument("--out", type=Path, default=BENCH, help="folder of results/ and RESULTS.md")
    options, more = parser.parse_known_args()
    if options.mode == "tune":
        return tune(more)
    if more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if options.mode != "cpu" and not shutil.which("nvidia-smi"):
        print(f"[{options.mode}] no NVIDIA GPU here (no nvidia-smi)")
        return 1
    files = [Path(file).name for file in options.files] or FILES[options.mode]
    if os.environ.get("SLICETUNE_BENCH") == "smoke":
        files = [" ".join(files)]
    started, found, tests = time.monotonic(), {}, {}
    with tempfile.TemporaryDirectory() as links:
        env = environment(options.mode, Path(links))
        if options.mode == "gpu" and not options.files:
            tests = kernel_tests(env)
        for file in files:
            print(f"[bench] {file}", flush=True)
            left = WHOLE[options.mode] - (time.monotonic() - started)
            found[file] = measure(file, env, max(1.0, min(LIMIT[options.mode], left)))
            print(f"[bench] {file}: {found[file]['failure'] or 'done'}, {found[file]['seconds']} s", flush=True)
        path = save(options.out / "results", options.mode, found, tests)
        subprocess.run([sys.executable, str(BENCH / "report.py"), str(options.out)], env=env, check=True)
    bad = [file for file, each in found.items() if each["failure"]] + [t for t, how in tests.items() if how != "passed"]
    print(f"[bench] {path} and RESULTS.md in {time.monotonic() - started:.0f} s" + (f"; failed: {bad}" if bad else ""))
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
