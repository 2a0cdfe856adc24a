"""Charts of the analyses, in the look of figures.py: inline SVG that takes its colours from the page.

    lines({"IT": [(0.25, 31.0), (0.5, 31.4)]}, "neurons, %", "BLEU")
    histogram(counts, chosen, edges, "mutual information, nats")
    matrix(values, names)
    intervals([("joint", -0.01, -0.02, 0.00)], "difference, nats a token")
    scatter({"gate": points}, "score", "change of the loss")

Pure functions of numbers. Values that are not finite are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from .figures import BOTTOM, HEIGHT, RIGHT, TOP, WIDTH, Frame, Point, padded, svg, ticks

COLOURS = 6
"""Classes s0 to s5 of the style sheet; a seventh series starts again."""
GAP = 14
"""Pixels between two labels, one above the other."""
LETTER = 7.0
"""Pixels of a letter, at most on average."""


def lines(series: Mapping[str, Sequence[Point]], x_name: str, y_name: str) -> str:
    """One line with points a series, named at its right end; empty without a point."""
    series = {name: [p for p in points if math.isfinite(p[1])] for name, points in series.items()}
    every = [point for points in series.values() for point in points]
    if not every:
        return ""
    xs, ys = zip(*every, strict=True)
    frame = Frame(*padded(min(xs), max(xs)), *padded(min(ys), max(ys)), x_text=lambda v: f"{v:g}")
    parts = [frame.axes(x_name, y_name)]
    ends = []
    for i, (name, points) in enumerate((n, p) for n, p in series.items() if p):
        kind = f"s{i % COLOURS}"
        parts.append(f'<polyline class="{kind}" points="{frame.path(points)}"/>')
        parts += [_dot(frame, p, kind, f"{name}: {p[1]:.2f} at {p[0]:g}") for p in points]
        ends.append((frame.place(points[-1]), name, kind))
    parts += _end_labels(ends)
    return svg(WIDTH, HEIGHT, f"{y_name} by {x_name}: {', '.join(series)}", parts)


def _end_labels(ends: Sequence[tuple[Point, str, str]]) -> list[str]:
    """Names beside the last points, pushed down where they would overlap, and up again at the bottom."""
    ordered = sorted(ends, key=lambda end: end[0][1])
    heights: list[float] = []
    for (_, y), _, _ in ordered:
        heights.append(max(y, heights[-1] + GAP) if heights else y)
    over = max(0.0, heights[-1] - (HEIGHT - BOTTOM))
    return [
        f'<text class="label {kind}" x="{x + 9:.1f}" y="{height - over + 4:.1f}">{escape(name)}</text>'
        for height, ((x, _), name, kind) in zip(heights, ordered, strict=True)
    ]


def _dot(frame: Frame, point: Point, kind: str, label: str, radius: float = 3.5) -> str:
    x, y = frame.place(point)
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escape(label)}</title></circle>'


def histogram(
    counts: Sequence[int], chosen: Sequence[int], edges: Sequence[float], x_name: str, mark: float | None = None
) -> str:
    """Bars of all (`counts`) and of the chosen among them by bin, on a logarithmic scale of counts.

    `edges` are one more than the bins; `mark` draws a line at that value (γ).
    """
    assert len(counts) == len(chosen) == len(edges) - 1
    if not any(counts):
        return ""
    height = lambda n: math.log10(n) + 0.3 if n > 0 else 0.0  # noqa: E731  (one neuron is still a bar)
    frame = Frame(
        edges[0],
        edges[-1],
        0.0,
        height(max(counts)) * 1.04,
        x_text=lambda v: f"{v:g}",
        y_ticks=[(height(10**k), f"{10**k:,}") for k in range(math.ceil(math.log10(max(counts))) + 1)],
    )
    parts = [frame.axes(x_name, "neurons (logarithmic)")]
    for kind, numbers in (("faint", counts), ("s1", chosen)):
        for i, n in enumerate(numbers):
            if n:
                (x0, y0), (x1, _) = frame.place((edges[i], height(n))), frame.place((edges[i + 1], 0.0))
                label = f"{edges[i]:.4g} to {edges[i + 1]:.4g}: {chosen[i]:,} of {counts[i]:,} chosen"
                size = f'width="{max(x1 - x0 - 1, 0.5):.1f}" height="{HEIGHT - BOTTOM - y0:.1f}"'
                parts.append(
                    f'<rect class="{kind}" x="{x0:.1f}" y="{y0:.1f}" {size}><title>{escape(label)}</title></rect>'
                )
    if mark is not None and edges[0] <= mark <= edges[-1]:
        x, _ = frame.place((mark, 0.0))
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x + 5:.1f}" y="{TOP + 12}">γ {mark:.3g}</text>')
    return svg(WIDTH, HEIGHT, f"{sum(counts):,} neurons by {x_name}, {sum(chosen):,} chosen", parts)


def matrix(
    values: Sequence[Sequence[float | None]], names: Sequence[str], columns: Sequence[str] = (), most: float = 1.0
) -> str:
    """A square (or not) of shares, or of other numbers up to `most`: each in its cell, stronger colour for more."""
    columns = columns or names
    left = 12 + LETTER * max(map(len, names))
    wide, high = max(52.0, *(LETTER * len(name) + 8 for name in columns)), 22
    parts = []
    for j, name in enumerate(columns):
        parts.append(f'<text class="name" x="{left + (j + 0.5) * wide:.1f}" y="15">{escape(name)}</text>')
    for i, row in enumerate(values):
        y = 22 + i * high
        parts.append(f'<text class="tick" x="{left - 6:.1f}" y="{y + 15}">{escape(names[i])}</text>')
        for j, value in enumerate(row):
            if value is None or not math.isfinite(value):
                continue
            fill = 0.88 * min(max(value / (most or 1.0), 0.0), 1.0)
            where = f'x="{left + j * wide:.1f}" y="{y}" width="{wide - 1:.1f}" height="{high - 1}"'
            label = f"{names[i]}, {columns[j]}: {value:.4f}"
            parts.append(f'<rect class="none" {where}/>')
            parts.append(f'<rect class="cell" {where} fill-opacity="{fill:.3f}"><title>{escape(label)}</title></rect>')
            tone = "strong" if fill > 0.55 else "weak"
            parts.append(f'<text class="{tone}" x="{left + (j + 0.5) * wide:.1f}" y="{y + 15}">{value:.2f}</text>')
    return svg(round(left + wide * len(columns) + 2), 24 + high * len(values), "Shares", parts)


def intervals(rows: Sequence[tuple[str, float, float, float]], x_name: str) -> str:
    """(name, value, low, high) a row, with a line at zero: what lies wholly on one side differs."""
    rows = [row for row in rows if all(map(math.isfinite, row[1:]))]
    if not rows:
        return ""
    left, high = 12 + LETTER * max(len(name) for name, *_ in rows), 22
    x0, x1 = padded(min(0.0, *(low for _, _, low, _ in rows)), max(0.0, *(up for *_, up in rows)))
    place: Callable[[float], float] = lambda v: left + (v - x0) / (x1 - x0) * (WIDTH - left - 16)  # noqa: E731
    bottom = 8 + high * len(rows)
    parts = [f'<line class="mark" x1="{place(0):.1f}" x2="{place(0):.1f}" y1="4" y2="{bottom}"/>']
    for i, (name, value, low, up) in enumerate(rows):
        y, kind = 20 + i * high, "s0" if low > 0 or up < 0 else "s5"
        label = f"{name}: {value:+.4f} ({low:+.4f} to {up:+.4f})"
        parts.append(f'<text class="tick" x="{left - 8:.1f}" y="{y + 4}">{escape(name)}</text>')
        parts.append(f'<line class="{kind}" x1="{place(low):.1f}" x2="{place(up):.1f}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<circle class="{kind}" cx="{place(value):.1f}" cy="{y}" r="4"><title>{escape(label)}</title></circle>'
        )
    for value in ticks(x0, x1, 6):
        parts.append(f'<text class="name" x="{place(value):.1f}" y="{bottom + 16}">{value:g}</text>')
    parts.append(f'<text class="name" x="{(left + WIDTH) / 2:.0f}" y="{bottom + 34}">{escape(x_name)}</text>')
    return svg(WIDTH, bottom + 40, f"{x_name}: {len(rows)} intervals", parts)


def scatter(series: Mapping[str, Sequence[Point]], x_name: str, y_name: str) -> str:
    """Points on two logarithmic scales, a colour a series; what is not above 0 has no place and is left out."""
    logs = {
        name: [(math.log10(x), math.log10(y)) for x, y in points if 0 < x < math.inf and 0 < y < math.inf]
        for name, points in series.items()
    }
    every = [point for points in logs.values() for point in points]
    if not every:
        return ""
    xs, ys = zip(*every, strict=True)
    power = lambda v: f"1e{int(v)}" if v == int(v) else None  # noqa: E731
    frame = Frame(*padded(min(xs), max(xs)), *padded(min(ys), max(ys)), x_text=power, y_text=power)
    return _cloud(frame, logs, x_name, y_name, lambda p: f"{10 ** p[0]:.3g}, {10 ** p[1]:.3g}")


def plane(series: Mapping[str, Sequence[Point]], x_name: str, y_name: str) -> str:
    """Points of a plane, a colour a series; empty without a point."""
    series = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in series.items()}
    every = [point for points in series.values() for point in points]
    if not every:
        return ""
    xs, ys = zip(*every, strict=True)
    frame = Frame(*padded(min(xs), max(xs)), *padded(min(ys), max(ys)), x_text=lambda v: f"{v:g}")
    return _cloud(frame, series, x_name, y_name, lambda p: f"{p[0]:.3g}, {p[1]:.3g}")


def _cloud(
    frame: Frame, series: Mapping[str, Sequence[Point]], x_name: str, y_name: str, text: Callable[[Point], str]
) -> str:
    """Points in a frame, the series named on the right; `text` is what a point says when the pointer rests on it."""
    parts = [frame.axes(x_name, y_name)]
    for i, (name, points) in enumerate(series.items()):
        kind = f"s{i % COLOURS}"
        parts += [_dot(frame, p, kind, f"{name}: {text(p)}", 2.5) for p in points]
        where = f'x="{WIDTH - RIGHT + 9}" y="{TOP + 12 + i * GAP}"'
        parts.append(f'<text class="label {kind}" {where}>{escape(name)}</text>')
    return svg(WIDTH, HEIGHT, f"{y_name} by {x_name}: {sum(map(len, series.values())):,} points", parts)


def grouped_bars(groups: Sequence[str], series: Mapping[str, Sequence[float]], y_name: str) -> str:
    """A bar for each series in each group, side by side from 0; a colour a series."""
    most = max((v for values in series.values() for v in values if math.isfinite(v)), default=0.0)
    if most <= 0:
        return ""
    frame = Frame(0.0, float(len(groups)), 0.0, most * 1.06, x_text=lambda v: None)
    parts, width = [frame.axes("", y_name)], 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        kind = f"s{i % COLOURS}"
        for j, value in enumerate(values):
            (x0, y), (x1, bottom) = (
                frame.place((j + 0.1 + i * width, value)),
                frame.place((j + 0.1 + (i + 1) * width, 0)),
            )
            where = f'x="{x0:.1f}" y="{y:.1f}" width="{x1 - x0 - 1:.1f}" height="{bottom - y:.1f}"'
            title = escape(f"{name}, {groups[j]}: {value:.4g}")
            parts.append(f'<rect class="{kind}" {where}><title>{title}</title></rect>')
        where = f'x="{WIDTH - RIGHT + 9}" y="{TOP + 12 + i * GAP}"'
        parts.append(f'<text class="label {kind}" {where}>{escape(name)}</text>')
    for j, name in enumerate(groups):
        x, _ = frame.place((j + 0.5, 0.0))
        parts.append(f'<text class="name" x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}">{escape(name)}</text>')
    return svg(WIDTH, HEIGHT, f"{y_name}: {', '.join(series)}", parts)
