"""The stages of a run that change weights: train, export, delta, adapter. Next: measure.py."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..common import checkpoint, distributed, private
from ..common.errors import UserError
from ..common.files import write_json
from ..common.settings import kept
from ..data.batching import Example
from ..export import adapter, attached, delta
from ..export.live import CHOSEN, chosen_masters
from ..export.model import export_model, summary
from ..methods.landermt.patches import trained as trained_routes
from ..methods.method import Method
from ..models import load
from ..models.shapes import ModelShape
from ..slices.patches import Patch
from ..training.metrics import peak_memory
from ..training.train import Setup, train
from .config import RunConfig
from .job import Job
from .prompted import warned


def check(config: RunConfig) -> None:
    """Raises UserError for settings of training that do not go together."""
    if config.train.sweep and not config.data.dev_sentences:
        raise UserError("--train.sweep chooses by dev loss: set --data.dev-sentences above 0")
    if config.train.sweep and config.resume != "auto":
        raise UserError(f"--resume {config.resume}: a sweep has a checkpoint for each rate: use --resume auto")


def train_and_choose(job: Job, sentences: Sequence[Example], dev: Sequence[Example], settings: dict[str, Any]) -> None:
    """Train once, or once a rate of the sweep; chosen.json names the checkpoint to export.

    `settings` are those of all stages up to here: what checkpoints belong to.
    """
    c, method = job.config, job.config.method
    chosen = method.load_chosen(job.out)
    identity = {"neurons": chosen.fingerprint if chosen else "", "settings": settings}
    compiled = c.model.compile == "blocks"
    stage = job.training_once_chosen()
    beside = Setup(job.pad_id, job.stage, c.seed, c.resume, compiled, stage.score.batch_tokens)
    trained, counts = {}, {}
    for rate in c.train.sweep or (c.train.learning_rate,):
        model = warned(job, job.model(stage=stage))
        groups, recompute = c.data.directions_of_groups, c.model.recompute_ffn
        method.prepare(model, chosen, seed=c.seed, groups=groups, recompute=recompute)
        counts = _count(method, job.shape, model)
        one = replace(c.train, learning_rate=rate, sweep=())
        folder = job.out / "sweep" / f"lr-{rate:g}" if c.train.sweep else job.out
        whose = identity | {"learning_rate": rate}
        setup = replace(beside, settings=kept(replace(c, train=one)))
        trained[rate] = train(model, one, setup, sentences, dev, folder, whose)
        del model
    if distributed.rank() == 0:
        _choose(job.out, trained, counts | {"peak_memory_bytes": peak_memory()}, sweep=bool(c.train.sweep))


def _count(method: Method, shape: ModelShape, model: nn.Module) -> dict[str, int]:
    """Parameters that training will change, and those that the base does not have; printed."""
    trained = sum(private.whole_size(p) for p in model.parameters() if p.requires_grad)
    added = method.bounds(shape).added
    share = f"{trained / shape.parameters:.2%} of the model's {shape.parameters:,}"
    distributed.print0(f"{method.title}: {trained:,} trainable parameters ({share}), {added:,} added")
    return {"trainable_parameters": trained, "added_parameters": added}


def _choose(out: Path, trained: dict[float, Path], counts: dict[str, int], sweep: bool) -> None:
    """chosen.json from the checkpoints by learning rate: the lowest dev loss; of a sweep its metrics.jsonl besides."""
    losses = {rate: checkpoint.read_state(folder)["best_dev_loss"] for rate, folder in trained.items()}
    best = min(losses, key=losses.__getitem__)
    for rate, loss in losses.items() if sweep else ():
        print(f"learning rate {rate:g}: dev loss {loss:.4f}{'  ← taken' if rate == best else ''}", flush=True)
    if sweep:
        shutil.copy(trained[best].parents[1] / "metrics.jsonl", out / "metrics.jsonl")
    chosen = {"checkpoint": str(trained[best].relative_to(out)), "learning_rate": best, "dev_loss": losses}
    write_json(out / CHOSEN, chosen | counts)


def patches(method: Method, out: Path, base: Path) -> dict[str, Patch]:
    """What the chosen checkpoint changes in the base, by tensor name."""
    return method.patches(base, method.load_chosen(out), chosen_masters(out))


def export_merged(config: RunConfig, base: Path, shape: ModelShape, ends: Sequence[int]) -> None:
    """Leave model/, of a routed model with its routes; `ends` is export_model's. The first rank alone calls it."""
    method, out = config.method, Path(config.out)
    deeper, changes = method.expansion(shape.layers), patches(method, out, base)
    print(summary(export_model(base, changes, out / "model", config.evaluate.dtype, deeper, ends)), flush=True)
    if method.routed:
        trained_routes(base, method.load_chosen(out), chosen_masters(out)).save(out / "model" / method.chosen_file)


def export_attached(method: Method, out: Path, base: Path, base_name: str) -> None:
    """Leave attached/: what cannot be merged; the first rank alone calls it."""
    line = attached.save(out / method.trained_folder, method, base_name, load.fingerprint(base), chosen_masters(out))
    print(line, flush=True)


def write_delta(method: Method, out: Path, base: Path) -> None:
    """Leave delta/; the first rank alone calls it."""
    print(delta.write(base, out / "model", patches(method, out, base), out / "delta"), flush=True)


def write_adapter(method: Method, out: Path, base_name: str, kind: str) -> None:
    """Leave adapter/ for PEFT; the first rank alone calls it."""
    if method.low_rank:
        adapter.write_lora(method, chosen_masters(out), base_name, out / "adapter")
    else:
        adapter.write(out / "delta", base_name, out / "adapter", kind == "ranks")
