"""The stages of a run that choose what is trained: score, then select. LANDeRMT's are in landermt/stages.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..common import distributed
from ..data import examples
from ..scoring.score import scored
from ..scoring.statistics import Statistics
from ..training.metrics import peak_memory
from . import detect as detection_stages

if TYPE_CHECKING:
    from .job import Run


def score(run: Run) -> None:
    """Leave `run.scores`: another run's where --score.reuse names one, else of a scoring pass of its own."""
    if not run.config.score.reuse:
        return _score(run)
    other = Path(run.config.score.reuse)
    distributed.first(lambda: run.stages.take("score", other, run.scores))
    distributed.print0(f"the scores of {other} are taken")


def _score(run: Run) -> None:
    if run.config.method.routes:
        return detection_stages.score(run)
    c, load = run.config, lambda: run.model(run.base)
    data = run.examples("train", c.data.score_sentences)
    distributed.print0("one of them, what is trained between brackets:\n" + examples.show(run.tokenizer, data[0]))
    identity, pad_id = run.stages.settings, run.tokenizer.pad_token_id
    stats, clear = scored(load, data, c.data.groups, run.shape, c.score, run.out, identity, pad_id)
    run.peak = max(run.peak, peak_memory())
    if distributed.rank() == 0:
        stats.save(run.out / "statistics.safetensors", run.stages.settings)
    clear()


def select(run: Run) -> None:
    """Leave neurons.safetensors; the first rank alone calls it."""
    method = run.config.method
    stats = Statistics.load(run.out / "statistics.safetensors") if method.scores else None
    neurons, warnings = method.select(stats, run.shape, run.config.seed)
    neurons.provenance |= {"run": run.stages.settings}
    print(neurons.describe(), flush=True)
    for warning in warnings:
        print(f"warning: {warning}", flush=True)
    neurons.save(run.out / "neurons.safetensors")
