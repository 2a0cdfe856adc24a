"""Which readings of the paper are better than a run's own: over sentences, and over seeds. readings.py trains them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.settings import fingerprint, of_stage
from ..evaluation.report.answer import Table
from ..methods.caneft.settings import Caneft
from ..scoring.config import ScoreConfig
from ..slices.neurons import NeuronSet
from .paired import Paired, holm, paired

LEVEL = 0.05
"""Chance of one false alarm among all readings."""


@dataclass
class Result:
    """One reading, trained with one seed, against the default."""

    reading: Reading
    neurons: NeuronSet | None
    losses: Tensor
    versus: Paired
    shared: float
    """Of the neurons, those that the default has too."""

    @property
    def tested(self) -> bool:
        """Whether it is a reading of the paper: random neurons and the untrained base are not."""
        return self.neurons is not None and type(self.reading.method) is Caneft


@dataclass
class Seeds:
    """One reading over all seeds: losses [seeds, dev sentences], and each seed's averages of BLEU and chrF."""

    name: str
    losses: Tensor
    scores: list[dict[str, dict[str, float]]]


def verdicts(first: Sequence[Result]) -> list[tuple[float, str]]:
    """Adjusted p and a word for every result but the default: against it, after Holm over all other readings."""
    tested = [i for i, r in enumerate(first) if i and r.tested]
    adjusted = dict(zip(tested, holm([first[i].versus.p for i in tested]), strict=True))
    words = []
    for i, result in enumerate(first):
        p = adjusted.get(i, result.versus.p)
        same = result.neurons is not None and result.neurons == first[0].neurons
        if i == 0 or same:
            words.append((math.nan, "the default" if i == 0 else "same neurons"))
        elif p >= LEVEL:
            words.append((p, "no difference shown"))
        else:
            words.append((p, "better" if result.versus.difference < 0 else "worse"))
    return words


def seeds_agree(reading: Seeds, default: Seeds) -> tuple[Paired, Paired, bool]:
    """Differences over sentences (each one's mean over seeds) and over seeds; whether both show the reading better."""
    sentences = paired(reading.losses.mean(0), default.losses.mean(0))
    seeds = paired(reading.losses.mean(1), default.losses.mean(1))
    return sentences, seeds, sentences.high < 0 and seeds.high < 0  # NaN, of one seed, shows nothing


def table(first: Sequence[Result]) -> Table:
    """Every reading, with its verdict; the default comes first."""
    rows = []
    for result, (p, word) in zip(first, verdicts(first), strict=True):
        v, count = result.versus, result.neurons.count if result.neurons else 0
        trained = result.neurons.parameters() if result.neurons else 0
        row = [result.reading.name, count, trained, result.shared, float(result.losses.mean())]
        rows.append([*row, v.difference, v.low, v.high, p, word])
    columns = ["reading", "neurons", "trained", "shared", "dev loss"]
    columns += ["difference", "low", "high", "p (Holm)", "verdict"]
    return Table("all", columns, rows, "Every reading against the default, one seed", 4)


def seed_table(again: Sequence[Seeds]) -> Table:
    """Mean ± deviation over seeds, and the differences to the default."""
    rows = []
    for one in again:
        sentences, seeds, better = seeds_agree(one, again[0])
        cells: list[Any] = [one.name, _spread(one.losses.mean(1).tolist(), 4)]
        cells += [sentences.difference, sentences.low, sentences.high, seeds.low, seeds.high]
        for part in ("seen", "unseen"):
            values = [scores[part]["bleu"] for scores in one.scores if part in scores]
            cells.append(_spread(values, 2) if values else "")
        rows.append([*cells, "better" if better else ""])
    columns = ["reading", "dev loss", "difference", "low", "high", "low (seeds)", "high (seeds)"]
    return Table("seeds", [*columns, "BLEU seen", "BLEU unseen", "verdict"], rows, "The best readings, every seed", 4)


def _spread(values: Sequence[float], digits: int) -> str:
    deviation = float(torch.tensor(values).std()) if len(values) > 1 else math.nan
    return f"{sum(values) / len(values):.{digits}f} ± {deviation:.{digits}f}"


@dataclass(frozen=True)
class Reading:
    """One way to read the paper: what is scored, what is chosen."""

    name: str
    method: Caneft
    score: ScoreConfig

    @property
    def folder(self) -> str:
        return fingerprint([type(self.method).__name__, asdict(self.method), of_stage(self.score, "score")])
