"""The stages of a run that change weights: train, export, delta, adapter. Next: decoding_stages.py."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..common import checkpoint, distributed
from ..common.errors import UserError
from ..common.files import write_atomically
from ..export import adapter, delta
from ..export import attached as bottleneck
from ..export.model import export_model, summary
from ..methods.landermt.patches import trained as trained_routes
from ..methods.landermt.routes import ROUTES
from ..methods.lora import Lora
from ..models import load as models
from ..slices.patches import Patch
from ..training.metrics import peak_memory
from ..training.train import train

if TYPE_CHECKING:
    from .job import Run


def train_and_choose(run: Run) -> None:
    """Train once, or once a rate of the sweep; `chosen.json` names the checkpoint to export."""
    c = run.config
    if c.train.sweep and not c.data.dev_sentences:
        raise UserError("--train.sweep chooses by dev loss: set --data.dev-sentences above 0")
    if c.train.sweep and c.resume != "auto":
        raise UserError(f"--resume {c.resume}: a sweep has a checkpoint for each rate: use --resume auto")
    train_set = run.examples("train", c.train_sentences, c.data.train_pairs)
    dev = run.examples("dev", c.data.dev_sentences, c.data.train_pairs) if c.data.dev_sentences else []
    selected, method = run.selected, c.method
    identity = {"neurons": selected.fingerprint if selected else "", "settings": run.stages.settings}
    trained, pad_id = {}, run.tokenizer.pad_token_id
    for rate in c.train.sweep or (c.train.learning_rate,):
        model = run.model(run.base)
        method.prepare(model, selected, c)
        counts = _count(run, model)
        one = replace(c, train=replace(c.train, learning_rate=rate, sweep=()))
        folder = run.out / "sweep" / f"lr-{rate:g}" if c.train.sweep else run.out
        whose = identity | {"learning_rate": rate}
        trained[rate] = train(model, one, train_set, dev, folder, pad_id=pad_id, identity=whose)
        del model
    run.peak = max(run.peak, peak_memory())
    if distributed.rank() == 0:
        _choose(run, trained, counts)


def _count(run: Run, model: nn.Module) -> dict[str, int]:
    """Parameters that training will change, and those that the base does not have; printed."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    added = run.config.method.bounds(run.shape).added
    share = f"{trained / run.shape.parameters:.2%} of the model's {run.shape.parameters:,}"
    distributed.print0(f"{run.config.method.title}: {trained:,} trainable parameters ({share}), {added:,} added")
    return {"trainable_parameters": trained, "added_parameters": added}


def _choose(run: Run, trained: dict[float, Path], counts: dict[str, int]) -> None:
    """chosen.json from the checkpoints by learning rate: the lowest dev loss."""
    losses = {rate: checkpoint.read_state(folder)["best_dev_loss"] for rate, folder in trained.items()}
    best = min(losses, key=losses.__getitem__)
    for rate, loss in losses.items() if len(losses) > 1 else ():
        print(f"learning rate {rate:g}: dev loss {loss:.4f}{'  ← taken' if rate == best else ''}", flush=True)
    if len(losses) > 1:
        shutil.copy(trained[best].parents[1] / "metrics.jsonl", run.out / "metrics.jsonl")
    chosen = {"checkpoint": str(trained[best].relative_to(run.out)), "learning_rate": best, "dev_loss": losses}
    chosen |= counts | {"peak_memory_bytes": run.peak}
    write_atomically(run.out / "chosen.json", json.dumps(chosen, indent=1))


def chosen(run: Run) -> dict[str, Any]:
    """chosen.json: the checkpoint to export, its learning rate, dev losses by rate, counts."""
    return json.loads((run.out / "chosen.json").read_text())


def export(run: Run) -> None:
    """Leave model/, or attached/ where what was trained cannot be merged; the first rank alone calls it."""
    if not run.config.method.merges:
        tensors, _ = checkpoint.load(run.out / chosen(run)["checkpoint"])
        known = models.fingerprint(run.base)
        print(bottleneck.save(run.trained, run.config.method, run.base_name, known, tensors), flush=True)
        return
    expansion = run.config.method.expansion(run.shape.layers)
    dtype = run.config.evaluate.dtype
    print(summary(export_model(run.base, patches(run), run.out / "model", dtype, expansion)), flush=True)
    if run.config.method.routed:
        tensors, _ = checkpoint.load(run.out / chosen(run)["checkpoint"])
        trained_routes(run.base, run.selected, tensors).save(run.trained / ROUTES)


def patches(run: Run) -> dict[str, Patch]:
    """What the chosen checkpoint changes in the base, by tensor name."""
    tensors, _ = checkpoint.load(run.out / chosen(run)["checkpoint"])
    return run.config.method.patches(run.base, run.selected, tensors)


def write_delta(run: Run) -> None:
    """Leave delta/; the first rank alone calls it."""
    print(delta.write(run.base, run.out / "model", patches(run), run.out / "delta"), flush=True)


def write_adapter(run: Run) -> None:
    """Leave adapter/ for PEFT; the first rank alone calls it."""
    method = run.config.method
    if isinstance(method, Lora):
        tensors, _ = checkpoint.load(run.out / chosen(run)["checkpoint"])
        adapter.write_lora(method, tensors, run.base_name, run.out / "adapter")
    else:
        ranks = run.config.export.adapter == "ranks"
        adapter.write(run.out / "delta", run.base_name, run.out / "adapter", ranks)
