"""How many neurons are enough: a CANEFT run again with other ratios, from the same scores (Fig. 2).

    slicetune ask ratios runs/caneft
    torchrun --nproc_per_node 8 -m slicetune.engine ask ratios runs/caneft --ratios 0.005 0.01 0.02

Every ratio is selected, trained and decoded as the run was, at the rate that the run trained with, in a folder of its
own under RUN/analyses/ratios/; the run's own ratio is not run again. Stopped, it goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..common import distributed, signals
from ..common.errors import UserError
from ..evaluation.comparison import METRICS
from ..evaluation.report.answer import Figure, Table, folder_of, write
from ..evaluation.report.charts import lines
from ..evaluation.report.sections import domain_name
from ..run.config import RunConfig, read_run
from ..run.run import run_one
from .source import caneft_of, finished, loss_text


@dataclass
class Arguments:
    """BLEU, chrF and COMET of every domain by the share of neurons that is chosen."""

    run: str
    """A finished CANEFT run, whose statistics and settings are taken."""
    ratios: tuple[float, ...] = field(default_factory=lambda: (0.0025, 0.005, 0.0075, 0.01, 0.0125, 0.015))

    def __post_init__(self) -> None:
        if not self.ratios or len(set(self.ratios)) != len(self.ratios):
            raise UserError(f"--ratios {' '.join(map(str, self.ratios))}: name one or more, each once")


def settings(run: Path, ratio: float, rate: float) -> RunConfig:
    """The run's, with another ratio, the rate that it took, and its scores."""
    config = read_run(run)
    return replace(
        config,
        out=str(run / "analyses" / "ratios" / f"{ratio:g}"),
        method=replace(caneft_of(config), neuron_ratio=ratio),
        train=replace(config.train, learning_rate=rate, sweep=()),
        evaluate=replace(config.evaluate, base=False),
        score=replace(config.score, reuse=str(run)),
    )


def sweep(run: Path, ratios: tuple[float, ...]) -> dict[float, dict[str, Any]]:
    """results.json by ratio, ascending; the run's own is as it is. Every rank takes part."""
    own, done = caneft_of(read_run(run)).neuron_ratio, finished(run)
    configs = {ratio: settings(run, ratio, done["learning_rate"]) for ratio in sorted(ratios)}
    return {
        ratio: done if ratio == own else distributed.share_object(run_one(config)) for ratio, config in configs.items()
    }


def rows_of(found: Mapping[float, Mapping[str, Any]], metric: str) -> list[list[Any]]:
    """(ratio in %, trained parameters, dev loss, each domain's score, means over seen and unseen); the base is 0 %."""
    first = next(iter(found.values()))
    parts = [part for part in ("seen", "unseen") if first[part]]

    def row(ratio: float, trained: int, loss: str, system: Mapping[str, Any]) -> list[Any]:
        domains = [system["domains"][domain].get(metric) for domain in (*first["seen"], *first["unseen"])]
        return [100 * ratio, trained, loss, *domains, *(system["averages"][part].get(metric) for part in parts)]

    rows = [
        row(ratio, run["trainable_parameters"], loss_text(run), run["systems"][run["method"]])
        for ratio, run in found.items()
    ]
    base = next((r["systems"]["base"] for r in found.values() if "base" in r["systems"]), None)
    return [row(0.0, 0, "", base), *rows] if base else rows


def answer(given: Arguments) -> None:
    """Writes ratios.html and a table a metric."""
    signals.install()
    distributed.start()
    distributed.first_rank_first(lambda: folder_of(given.run))
    found = sweep(Path(given.run), given.ratios)
    distributed.first(lambda: report(given.run, found))
    distributed.stop()


def report(run: str, found: Mapping[float, Mapping[str, Any]]) -> None:
    """A table and a figure for each metric that was measured."""
    first = next(iter(found.values()))
    names = [domain_name(name) for name in (*first["seen"], *first["unseen"])]
    parts = [f"{part}, mean" for part in ("seen", "unseen") if first[part]]
    tables, figures = [], []
    for metric, label in METRICS:
        rows = rows_of(found, metric)
        if all(value is None for row in rows for value in row[3:]):
            continue
        tables.append(Table(metric, ["neurons, %", "trained", "dev loss", *names, *parts], rows, label))
        curves = {n: [(row[0], row[3 + i]) for row in rows if row[3 + i] is not None] for i, n in enumerate(names)}
        figures.append(Figure(label, lines(curves, "chosen neurons, % of all", label)))
    words = f"One run a ratio, seed {read_run(run).seed}: differences of a few tenths are within what seeds make. "
    words += "0 is the untrained base."
    write(run, "ratios", "Share of chosen neurons", words, tables, figures)
