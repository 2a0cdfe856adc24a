"""Plots of RESULTS.md: SVG, the same bytes for the same numbers."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLOURS = {"ours": "#1f6f8b", "floor": "#9aa5ac", "rival": "#c9803a", "peer": "#8a6fae"}


def draw(stem: str, tables: list[tuple[str, str, list[Row]]], folder: Path) -> list[Path]:
    """Writes what the tables allow; nothing where matplotlib is missing."""
    if not has_matplotlib():
        return []
    made = []
    step = next((rows for suite, _, rows in tables if suite == "step"), [])
    if any("peak_bytes" in row for row in step):
        made.append(_step(step, folder / f"{stem}-step.svg"))
    scoring = next((rows for suite, _, rows in tables if suite == "scoring"), [])
    if any(row.get("growth") for row in scoring):
        made.append(_growth(scoring, folder / f"{stem}-scoring.svg"))
    kernels = [(suite, rows) for suite, _, rows in tables if any(row["name"] == "copy" for row in rows)]
    if kernels:
        made.append(_kernels(kernels, folder / f"{stem}-kernels.svg"))
    return made


@functools.cache
def has_matplotlib() -> bool:
    """Whether it is here, set up to draw the same bytes; if not, says once what brings it."""
    try:
        import matplotlib
    except ImportError:
        print("[report] no plots: matplotlib is not installed: pip install 'slicetune[bench]'", file=sys.stderr)
        return False
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "slicetune"
    matplotlib.rcParams["font.size"] = 9
    return True


def save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
    return path


def _bars(axis: Any, rows: list[Row], values: list[float], title: str) -> None:
    names = [row["name"] for row in rows]
    axis.barh(names, values, color=[COLOURS[row["kind"]] for row in rows])
    axis.invert_yaxis()
    axis.set_title(title)
    for i, value in enumerate(values):
        axis.text(value, i, f" {value:.2f}", va="center")
    axis.margins(x=0.15)
    axis.spines[["top", "right"]].set_visible(False)


def _step(rows: list[Row], path: Path) -> Path:
    """Time relative to the floor, and peak memory."""
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "seconds" in row and "peak_bytes" in row]
    base = rows[0]["seconds"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.34 * len(rows) + 1.2))
    _bars(left, rows, [row["seconds"] / base for row in rows], f"a training step: time ÷ {rows[0]['name']}")
    unit, name = (1e9, "GB") if max(row["peak_bytes"] for row in rows) > 1e9 else (1e6, "MB")
    _bars(right, rows, [row["peak_bytes"] / unit for row in rows], f"peak memory, {name}")
    right.set_yticks([])
    return save(figure, path)


def _growth(rows: list[Row], path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.2))
    for row in rows:
        if row.get("growth"):
            counts = [int(n) for n in row["growth"]]
            axis.plot(counts, [b / 1e6 for b in row["growth"].values()], marker="o", label=row["name"])
    axis.set(
        xscale="log", xlabel="sentences scored", ylabel="MB above the start", ylim=(0, None), title="scoring memory"
    )
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return save(figure, path)


def _kernels(tables: list[tuple[str, list[Row]]], path: Path) -> Path:
    """GB/s of each contender's least bytes over those of the copy in the same table."""
    import matplotlib.pyplot as plt

    kept = []
    for suite, rows in tables:
        copy = next(row for row in rows if row["name"] == "copy")
        good = [row for row in rows if "seconds" in row and "bytes" in row and row is not copy]
        if "seconds" in copy and good:
            kept.append((suite, copy["bytes"] / copy["seconds"], good))
    height = sum(len(rows) for _, _, rows in kept) * 0.26 + 0.55 * len(kept) + 0.5
    ratios = [len(rows) + 1 for _, _, rows in kept] or [1]
    options = {"height_ratios": ratios, "hspace": 0.6}
    figure, axes = plt.subplots(len(ratios), 1, figsize=(8, height), sharex=True, gridspec_kw=options, squeeze=False)
    for axis, (suite, copy, rows) in zip(axes[:, 0], kept, strict=False):
        _bars(axis, rows, [row["bytes"] / row["seconds"] / copy for row in rows], f"{suite}: bandwidth ÷ copy")
    return save(figure, path)
