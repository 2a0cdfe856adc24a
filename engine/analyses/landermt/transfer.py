"""What training on one direction does to the others: LANDeRMT's Fig. 3, out of a run a direction.

    for p in de-en en-de; do python recipes/landermt_pairs_tiny.py --data.train-pairs $p --out runs/transfer/$p; done
    slicetune ask transfer runs/transfer/*

A row is what a run trained (--data.train-pairs), a column the direction that is decoded, each with its own route; a
cell is the BLEU or chrF that was gained over the untrained base. Files go to the first run's folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.errors import UserError
from ...evaluation.bleu import METRICS
from ...evaluation.report.answer import Figure, Table, write
from ...evaluation.report.charts import matrix
from ...run.config import read_run
from ..source import finished


@dataclass
class Arguments:
    """Gains over the base by trained and by decoded direction."""

    runs: tuple[str, ...]
    """Finished runs over the same --data.pairs, that differ in --data.train-pairs."""


def trained(run: Path) -> str:
    """The directions that a run trained. Raises UserError where it has one direction only."""
    data = read_run(run).data
    if not data.pairs:
        raise UserError(f"{run}: has one direction: set --data.pairs, and --data.train-pairs to what is trained")
    return " ".join(data.train_pairs or data.pairs)


def gains(results: Sequence[dict[str, Any]], metric: str) -> tuple[list[str], list[list[float]]]:
    """Directions, and a row a run: each direction's score less the base's, which any of the runs has decoded.

    Raises UserError where no run has the base, or they decoded other directions.
    """
    base = next((found["systems"]["base"]["pairs"] for found in results if "base" in found["systems"]), None)
    if base is None:
        raise UserError("none of these runs has decoded the base: run one of them with --evaluate.base")
    rows = []
    for found in results:
        own = found["systems"][found["method"]]["pairs"]
        if own.keys() != base.keys():
            raise UserError(f"runs of other directions: {' '.join(base)}, and {' '.join(own)}")
        rows.append([own[pair][metric] - base[pair][metric] for pair in base])
    return list(base), rows


def answer(given: Arguments) -> None:
    """Writes transfer.html and a table a metric."""
    if not given.runs:
        raise UserError("name one finished run, or more")
    runs = [Path(run) for run in given.runs]
    report(runs[0], [trained(run) for run in runs], [finished(run) for run in runs])


def report(run: Path, names: Sequence[str], results: Sequence[dict[str, Any]]) -> None:
    """A table and a picture a metric."""
    tables, figures = [], []
    for metric in METRICS:
        pairs, rows = gains(results, metric)
        marked = [[name, *row] for name, row in zip(names, rows, strict=True)]
        tables.append(Table(metric, ["trained on", *pairs], marked, f"Gain in {metric}"))
        most = max((value for row in rows for value in row), default=0.0)
        figures.append(Figure(f"Gain in {metric}", matrix(rows, names, pairs, most=most)))
    words = "Over the untrained base; every direction is decoded with its own route. Losses have no colour."
    write(run, "transfer", "Transfer between directions", words, tables, figures)
