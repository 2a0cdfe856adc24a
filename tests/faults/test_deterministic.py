"""`--deterministic`: two runs in processes of their own give the same weights, metrics and report data.

What they open to write is listed too (watched.py): all of it lies under --out or in the caches.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import ROOT, SMALL
from safetensors.torch import load_file

from slicetune.engine.data import tiny

MEASURED = {"time", "tokens_per_second", "mfu", "peak_memory_bytes", "peak_memory", "seconds", "report"}
"""What a clock or the system says: it differs between any two runs."""


def run(out: Path) -> Path:
    flags = SMALL | {"--model.path": str(tiny.model_dir("test")), "--out": str(out), "--deterministic": ""}
    flags |= {"--data.test-sentences": "2", "--data.score-sentences": "12"}
    words = [w for pair in flags.items() for w in pair if w]
    elsewhere = out.with_name(f"{out.name}-temporary")
    elsewhere.mkdir()
    command = [sys.executable, str(ROOT / "tests/faults/watched.py"), str(ROOT / "recipes/caneft_tiny.py"), *words]
    inherited = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}  # torch sets it in this process
    variables = inherited | {"SLICETUNE_WATCHED": f"{out}.written", "TMPDIR": str(elsewhere)}
    done = subprocess.run(
        command, env=variables, cwd=elsewhere, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def settled(value):
    """JSON without what was measured."""
    if isinstance(value, dict):
        return {key: settled(v) for key, v in value.items() if key not in MEASURED}
    return [settled(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return run(folder / "a"), run(folder / "b")


def test_a_run_writes_under_its_out_alone(runs):
    out, caches = runs[0], Path.home() / ".cache"
    written = {Path(line) for line in Path(f"{out}.written").read_text().splitlines()}
    assert {out / "results.json", out / "model"} <= written
    temporary = out.with_name(f"{out.name}-temporary")  # the working directory too
    allowed = (out, caches, temporary, Path("/dev"), Path("/proc/self"))
    assert not [path for path in written if not any(path.is_relative_to(folder) for folder in allowed)]
    left = [path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor_")]
    assert not left, "files were left in the working directory, or for temporary ones"


def test_two_runs_are_equal_to_the_bit(runs):
    first, second = runs
    tensors = [p.relative_to(first) for p in sorted(first.rglob("*.safetensors"))]
    assert len(tensors) >= 4  # statistics, neurons, checkpoint, model
    for path in tensors:
        one, other = load_file(first / path), load_file(second / path)
        assert one.keys() == other.keys()
        assert all(one[name].numpy().tobytes() == other[name].numpy().tobytes() for name in one), path
    for name in ("metrics.jsonl", "results.json", "chosen.json"):
        one, other = ([json.loads(line) for line in _documents(out / name)] for out in (first, second))
        assert settled(one) == settled(other), name
        assert settled(one)
    for path in sorted((first / "translations").rglob("*.en")):
        assert path.read_bytes() == (second / path.relative_to(first)).read_bytes()


def _documents(path: Path) -> list[str]:
    text = path.read_text()
    return text.splitlines() if path.suffix == ".jsonl" else [text]
