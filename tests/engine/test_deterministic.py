"""`--deterministic`: two runs in processes of their own give the same weights, metrics and report data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from jobs import ROOT, SMALL
from safetensors.torch import load_file

from slicetune.engine import tiny

MEASURED = {"time", "tokens_per_second", "mfu", "peak_memory_bytes", "seconds", "report"}
"""What a clock or the system says: it differs between any two runs."""


def run(out: Path) -> Path:
    flags = SMALL | {"--model.path": str(tiny.model_dir("test")), "--out": str(out), "--deterministic": ""}
    flags |= {"--data.test-sentences": "2", "--data.score-sentences": "12"}
    words = [w for pair in flags.items() for w in pair if w]
    command = [sys.executable, str(ROOT / "recipes/caneft_tiny.py"), *words]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def settled(value):
    """JSON without what was measured."""
    if isinstance(value, dict):
        return {key: settled(v) for key, v in value.items() if key not in MEASURED}
    return [settled(v) for v in value] if isinstance(value, list) else value


def test_two_runs_are_equal_to_the_bit(tmp_path):
    first, second = run(tmp_path / "a"), run(tmp_path / "b")
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
