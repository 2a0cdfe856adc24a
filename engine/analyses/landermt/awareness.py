"""What LANDeRMT's detection found, layer by layer: its Figures 4 to 8, and what other k and ε would choose.

    slicetune ask awareness runs/landermt

Mean activation and its difference to the next layer by direction (Fig. 4-5); mean awareness of general units, of units
specific to a language, and of all (Fig. 6-8), for every layer, as if each were chosen. All from awareness.safetensors:
no model is loaded. What other k and ε are worth takes training: what they choose is in two tables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ...evaluation.report.answer import Figure, Table, write
from ...evaluation.report.charts import lines
from ...methods.landermt.awareness import general_share, relevant
from ...methods.landermt.detection import SCORES, Detection
from ...methods.landermt.routes import GENERAL
from ...methods.landermt.settings import Landermt
from ..source import landermt_of

EPSILONS = tuple(i / 20 for i in range(21))


@dataclass
class Arguments:
    """Activation and awareness of every layer; what other k and ε would choose."""

    run: str
    """A run of LANDeRMT, its score stage done."""


def activation_rows(found: Detection) -> list[list[str | int | float]]:
    """(direction, layer, mean h, norm of the mean output, D of each reading): the last layer has no D."""
    scalar, vector = found.relevance("scalar"), found.relevance("vector")
    mean, norm = found.hidden.mean(-1), found.output.norm(dim=-1)
    rows: list[list[str | int | float]] = []
    for p, pair in enumerate(found.pairs):
        for layer in range(mean.shape[1]):
            differences = [float(d[p, layer]) if layer < d.shape[1] else math.nan for d in (scalar, vector)]
            rows.append([pair, layer, float(mean[p, layer]), float(norm[p, layer]), *differences])
    return rows


def awareness_rows(found: Detection, method: Landermt) -> list[list[str | int | float]]:
    """(language, layer, mean Φ of general units, of those specific to the language, of all; how many are specific)."""
    rows: list[list[str | int | float]] = []
    for layer in range(found.size["layers"]):
        phi = found.awareness[:, layer]
        owner = method.owners(phi)
        for i, language in enumerate(found.languages):
            means = [_mean(phi[i][chosen]) for chosen in (owner == GENERAL, owner == i)]
            rows.append([language, layer, *means, float(phi[i].mean()), int((owner == i).sum())])
    return rows


def k_rows(found: Detection, method: Landermt) -> list[list[str | int | float]]:
    """(k, the layer that it adds, its mean D, directions that have it among their own k, layers of all of those)."""
    relevance = found.relevance(method.activation)
    rows, before = [], torch.zeros(found.size["layers"], dtype=torch.bool)
    for k in range(1, found.size["layers"] + 1):
        shared, own = relevant(relevance, k, own=False)[0], relevant(relevance, k, own=True)
        layer = int((shared & ~before).nonzero())
        d = float(relevance[:, layer].mean()) if layer < relevance.shape[1] else math.nan
        rows.append([k, layer, d, int(own[:, layer].sum()), int(own.any(0).sum())])
        before = shared
    return rows


def epsilon_rows(found: Detection, method: Landermt) -> list[list[int | float]]:
    """(ε, general units of a layer, fewest and most of a language, lowest, mean and highest share of the directions).

    Over the layers that the run's k chooses; the share is CAR, general units' part of the awareness that takes part.
    """
    own = torch.tensor([[name in pair.split("-") for name in found.languages] for pair in found.pairs])
    takes = relevant(found.relevance(method.activation), method.k, method.layers == "per_pair")
    rows = []
    for epsilon in EPSILONS:
        counts, shares = [], []
        for layer in takes.any(0).nonzero().flatten().tolist():
            phi = found.awareness[:, layer]
            owner = replace(method, epsilon=epsilon).owners(phi)
            counts += [int((owner == i).sum()) for i in range(len(found.languages))]
            shares += general_share(phi, owner, own)[takes[:, layer]].tolist()
        general = replace(method, epsilon=epsilon).split(found.size["intermediate"]).general
        mean = math.fsum(shares) / len(shares)
        rows.append([epsilon, general, min(counts), max(counts), min(shares), mean, max(shares)])
    return rows


def _mean(values: Tensor) -> float:
    return float(values.mean()) if values.numel() else math.nan


def _series(rows: list[list], value: int) -> dict[str, list[tuple[float, float]]]:
    """Lines by a row's first cell: its second on the x axis, that of column `value` on the y axis."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        series.setdefault(row[0], []).append((row[1], row[value]))
    return series


def answer(given: Arguments) -> None:
    """Writes awareness.html and its tables."""
    report(given.run, Detection.load(Path(given.run) / SCORES), landermt_of(given.run))


def report(run: str, found: Detection, method: Landermt) -> None:
    """Tables, and the paper's figures."""
    method.check_depth(found.size["layers"])
    moves, aware = activation_rows(found), awareness_rows(found, method)
    by_k, by_epsilon = k_rows(found, method), epsilon_rows(found, method)
    tables = [
        Table("k", ["k", "adds layer", "D", "directions with it", "layers of all"], by_k, "Layers by k", 5),
        Table(
            "epsilon",
            ["epsilon", "general", "specific, fewest", "most", "share, lowest", "mean", "highest"],
            by_epsilon,
            "Units of a layer and shares of the general ones by ε",
            3,
        ),
        Table("activation", ["direction", "layer", "mean h", "output", "D", "D vector"], moves, shown=False),
        Table("awareness", ["language", "layer", "general", "specific", "all", "units"], aware, shown=False),
    ]
    figures = [
        Figure("Mean activation (Fig. 4)", lines(_series(moves, 2), "layer", "mean h")),
        Figure("Its difference to the next layer (Fig. 5)", lines(_series(moves, 4), "layer", "D")),
        Figure("Norm of the difference of the FFN's output", lines(_series(moves, 5), "layer", "D, vector")),
        Figure("Awareness of general units (Fig. 6)", lines(_series(aware, 2), "layer", "mean awareness")),
        Figure("Awareness of a language's own units (Fig. 7)", lines(_series(aware, 3), "layer", "mean awareness")),
        Figure("Awareness of all units (Fig. 8)", lines(_series(aware, 4), "layer", "mean awareness")),
        Figure("Share of the general units by ε", lines({"mean": [(r[0], r[5]) for r in by_epsilon]}, "ε", "share")),
    ]
    chosen = " ".join(str(row[1]) for row in sorted(by_k[: method.k], key=lambda row: row[1]))
    text = found.provenance.get("text", "")
    text = f"{text[:1].upper()}{text[1:]}"
    words = f"k = {method.k} chooses layers {chosen} of {found.size['layers']}, D by the {method.activation} reading. "
    write(run, "awareness", "Activation and awareness by layer", words + text, tables, figures)
