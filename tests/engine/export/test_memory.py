"""Export, delta and audit hold a tensor or a block of a model, never the whole: by their peak memory."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from slicetune.engine.common import checkpoint
from slicetune.engine.common.checkpoint import MASTER
from slicetune.engine.common.settings import as_dict
from slicetune.engine.export import delta, live
from slicetune.engine.export.audit import audit
from slicetune.engine.export.live import CHOSEN
from slicetune.engine.export.model import export_model
from slicetune.engine.methods.lape import Lape
from slicetune.engine.models.shapes import from_config
from slicetune.engine.run.config import RunConfig
from slicetune.engine.slices.neurons import NeuronSet

UNITS = torch.arange(0, 1536, 100)
MMAP_THRESHOLD, LARGE, USUAL = -3, 1 << 16, 1 << 25
"""The C library's name of the size from which freed memory goes back to the system at once; two such sizes.

A large model's tensors are above the usual one. Here all are small.
"""
WATCH = """
import select, sys
process, most = sys.argv[1], 0
def anonymous():
    for line in open(f"/proc/{process}/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10
before = anonymous()
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0.001)[0]:
    most = max(most, anonymous() - before)
print(most)
"""
"""Until it is told to end it looks how much memory a process holds that is no file's, and says the most.

Pages of the shards that are mapped are the system's to drop, so they do not count.
"""


@pytest.fixture(autouse=True)
def freed_at_once():
    library = ctypes.CDLL(None)
    library.mallopt(MMAP_THRESHOLD, LARGE)
    yield
    library.mallopt(MMAP_THRESHOLD, USUAL)


def large(base: Path, run: Path) -> int:
    """A model in many shards, and a run of LAPE's on it that is not exported yet; returns the model's bytes."""
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(base, max_shard_size="20MB")
    shape = from_config(config)
    slices = {(layer, role, "row"): UNITS for layer in (0, 1) for role in ("gate", "up")}
    slices |= {(layer, "down", "column"): UNITS for layer in (0, 1)}
    chosen = NeuronSet(slices, shape.layers, shape.widths, shape.fan_in)
    settings = RunConfig(method=Lape())
    settings.model.path = str(base)
    run.mkdir()
    (run / "config.json").write_text(json.dumps(as_dict(settings)))
    chosen.save(run / "neurons.safetensors")
    Lape().prepare(model, chosen)
    masters = {MASTER + n: p.detach().float() + 0.01 for n, p in model.named_parameters() if p.requires_grad}
    checkpoint.save(run / "checkpoints/step-1", masters, {"step": 1})
    (run / CHOSEN).write_text(json.dumps({"checkpoint": "checkpoints/step-1"}))
    return sum(file.stat().st_size for file in base.glob("*.safetensors"))


def peak(work: Callable[[], Any]) -> int:
    """The most memory that this process holds in `work` beyond what it held before."""
    gc.collect()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-S", "-c", WATCH, str(os.getpid())], **pipes) as watcher:
        assert watcher.stdout.readline() == "ready\n"
        work()
        return int(watcher.communicate("\n")[0])


def test_the_peak_is_seen():
    assert 32e6 <= peak(lambda: [torch.ones(8, 1000, 1000).sum() for _ in range(5)]) < 40e6


def test_a_model_is_never_held_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "WHOLE", 0.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    base, run, method = tmp_path / "base", tmp_path / "run", Lape()
    size = large(base, run)
    assert size > 80e6
    assert len([*base.glob("*.safetensors")]) == 5
    patches = method.patches(base, method.load_chosen(run), live.chosen_masters(run))
    assert peak(lambda: export_model(base, patches, run / "model")) < size / 10
    assert peak(lambda: delta.write(base, run / "model", patches, run / "delta")) < size / 10
    reports = []
    assert peak(lambda: reports.append(audit(base, run))) < size / 4  # a block in float32, and what loading takes
    assert reports[0].ok
    assert reports[0].likeness.streamed
