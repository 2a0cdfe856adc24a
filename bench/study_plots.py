"""Plots of a study: what a row reaches by what it trains, and its contrasts as intervals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from plots import has_matplotlib, save
from study_page import part_bleu
from study_plan import Plan

from slicetune.engine.evaluation.comparison import LEVEL


def draw(plan: Plan, model: str, found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes study-NAME-MODEL.svg; nothing where matplotlib is missing."""
    if not has_matplotlib():
        return []
    import matplotlib.pyplot as plt

    parts, contrasts = found["parts"], found["contrasts"] or found["against_base"]
    tall = max(len(found["rows"]), len(contrasts), 4) * 0.28 + 1.0
    figure, axes = plt.subplots(2, len(parts), figsize=(4.2 * len(parts), 2 * tall), squeeze=False)
    for i, (part, domains) in enumerate(parts.items()):
        _points(axes[0, i], found["rows"], domains, f"BLEU, {part}")
        _intervals(axes[1, i], contrasts, part)
    for axis in axes[:, 1:].flat:
        axis.set_yticklabels([])
    figure.tight_layout()
    return [save(figure, folder / f"study-{plan.name}-{model}.svg")]


def _points(axis: Any, rows: Mapping[str, Any], domains: list[str], title: str) -> None:
    """A dot a seed, a bar the mean."""
    labels = list(rows)
    for y, label in enumerate(labels):
        values = part_bleu(rows[label], domains)
        axis.plot(values, [y] * len(values), "o", color="#9aa5ac", markersize=4)
        axis.plot([fmean(values)], [y], "|", color="#1f6f8b", markersize=12, markeredgewidth=2)
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.set_title(title)
    axis.grid(axis="x", color="#e5e8ea")
    axis.spines[["top", "right"]].set_visible(False)


def _intervals(axis: Any, contrasts: list[Mapping[str, Any]], part: str) -> None:
    for y, each in enumerate(contrasts):
        difference = each["bleu"][part]
        sure = difference["holm"] < LEVEL
        colour = "#1f6f8b" if sure else "#9aa5ac"
        axis.plot([difference["low"], difference["high"]], [y, y], color=colour, linewidth=2)
        axis.plot([difference["mean"]], [y], "o", color=colour, markersize=5)
    axis.axvline(0, color="#444", linewidth=0.8)
    axis.set_yticks(range(len(contrasts)), [f"{each['row']} − {each['against']}" for each in contrasts])
    axis.invert_yaxis()
    axis.set_title(f"difference of BLEU, {part}")
    axis.spines[["top", "right"]].set_visible(False)
