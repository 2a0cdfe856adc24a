"""Figures of the report as inline SVG: they take their colours from the page, so they read in light and in dark.

    loss_chart([(1, 2.3), (2, 2.1)], dev=[(2, 2.2)])
    heat_map(counts)              # [layers, bins] integers: where in the model the chosen neurons lie

Pure functions of numbers; sections.py puts them on the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

Point = tuple[float, float]

WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 76, 14, 40
POINTS = 800
"""Points of a curve that is drawn; longer ones are averaged in buckets."""


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within [low, high], roughly `about` of them, 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def thin(points: Sequence[Point], limit: int = POINTS) -> list[Point]:
    """At most `limit` points: means of equal buckets."""
    size = -(-len(points) // limit)
    if size <= 1:
        return list(points)
    buckets = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in buckets]


def smooth(points: Sequence[Point], span: int) -> list[Point]:
    """Exponential moving average over about `span` points, without the bias of its start."""
    keep = 1 - 1 / span
    total = weight = 0.0
    result = []
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1
        result.append((x, total / weight))
    return result


def loss_chart(train: Sequence[Point], dev: Sequence[Point]) -> str:
    """Training loss (raw, and smoothed where there are many points) and dev loss by step, the lowest dev loss marked.

    Values that are not finite are left out. No points at all: an empty string.
    """
    train = [p for p in train if math.isfinite(p[1])]
    dev = [p for p in dev if math.isfinite(p[1])]
    if not train and not dev:
        return ""
    shown = thin(train)
    line = smooth(shown, max(len(shown) // 25, 1)) if len(shown) > 50 else shown
    xs = [x for x, _ in (*train, *dev)]
    ys = [y for _, y in (*(shown if len(shown) <= 50 else _central(shown)), *line, *dev)]
    frame = Frame(min(0.0, *xs), max(max(xs), 1.0), *padded(min(ys), max(ys)))
    parts = [frame.axes("step", "loss per target token")]
    if len(shown) > 50:
        parts.append(f'<polyline class="raw" points="{frame.path(shown)}"/>')
    parts.append(f'<polyline class="train" points="{frame.path(line)}"/>')
    parts.append(f'<polyline class="dev" points="{frame.path(dev)}"/>')
    best = min(dev, key=lambda p: p[1], default=None)
    for point in dev:
        x, y = frame.place(point)
        size, text = (5.5, " (lowest)") if point == best else (3.5, "")
        label = f"dev loss {point[1]:.4f} at step {point[0]:.0f}{text}"
        parts.append(f'<circle class="dev" cx="{x:.1f}" cy="{y:.1f}" r="{size}"><title>{label}</title></circle>')
    parts += frame.labels([("train", line), ("dev", dev)])
    return svg(WIDTH, HEIGHT, f"Loss by step: {len(train)} training and {len(dev)} dev values", parts)


def heat_map(counts: Sequence[Sequence[int]], columns: Sequence[str], most: int = 0, numbers: bool = False) -> str:
    """Rows are layers (0 on top), columns bins or projections; a cell's strength is its share of the largest count.

    `most` is the count of full strength (default: the largest here), so that several maps share a scale. `numbers`
    writes the counts into the cells.
    """
    wide, high = (max(46, *(7 * len(name) for name in columns)) if numbers else 11), 16
    top = 22
    most = most or max((n for row in counts for n in row), default=0) or 1
    parts = []
    for j, name in enumerate(columns):
        parts.append(f'<text class="name" x="{34 + (j + 0.5) * wide:.1f}" y="15">{escape(name)}</text>')
    for i, row in enumerate(counts):
        y = top + i * high
        if len(counts) <= 16 or i % 4 == 0 or (i == len(counts) - 1 and i % 4 > 1):
            parts.append(f'<text class="tick" x="28" y="{y + 12}">{i}</text>')
        for j, n in enumerate(row):
            share = n / most
            where = f'x="{34 + j * wide}" y="{y}" width="{wide - 1}" height="{high - 1}"'
            label = f"layer {i}, {columns[j] or f'part {j + 1} of {len(row)}'}: {n:,}"
            fill = 0.0 if n == 0 else 0.12 + 0.88 * min(share, 1.0)
            parts.append(f'<rect class="none" {where}/>')
            parts.append(f'<rect class="cell" {where} fill-opacity="{fill:.3f}"><title>{label}</title></rect>')
            if numbers and n:
                tone = "strong" if fill > 0.55 else "weak"
                parts.append(f'<text class="{tone}" x="{34 + (j + 0.5) * wide:.1f}" y="{y + 11.5}">{n:,}</text>')
    width = 34 + wide * max((len(row) for row in counts), default=1)
    total = sum(n for row in counts for n in row)
    return svg(width, top + high * len(counts) + 2, f"{total:,} chosen neurons over {len(counts)} layers", parts)


class Frame:
    """The plot's area: data → pixels. Ticks whose text is None are left out; `y_ticks` are one's own."""

    def __init__(
        self,
        x0: float,
        x1: float,
        y0: float,
        y1: float,
        x_text: Callable[[float], str | None] = lambda v: f"{int(v):,}" if v == int(v) else None,
        y_text: Callable[[float], str | None] = lambda v: f"{v:g}",
        y_ticks: Sequence[tuple[float, str]] = (),
    ) -> None:
        self.x0, self.x1, self.y0, self.y1 = x0, x1, y0, y1
        self.x_text, self.y_ticks = x_text, y_ticks or [(v, y_text(v)) for v in ticks(y0, y1)]

    def place(self, point: Point) -> Point:
        x = LEFT + (point[0] - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (point[1] - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)
        return x, min(max(y, TOP), HEIGHT - BOTTOM)

    def path(self, points: Sequence[Point]) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in map(self.place, points))

    def axes(self, x_name: str, y_name: str) -> str:
        parts = []
        for value, text in self.y_ticks:
            if text is None:
                continue
            _, y = self.place((self.x0, value))
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}">{text}</text>')
        for value in ticks(self.x0, self.x1, 7):
            if (text := self.x_text(value)) is not None:
                x, _ = self.place((value, self.y0))
                parts.append(f'<text class="name" x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}">{text}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text class="name" x="{middle:.0f}" y="{HEIGHT - 6}">{escape(x_name)}</text>')
        parts.append(f'<text class="axis" x="{LEFT + 6}" y="{TOP + 2}">{escape(y_name)}</text>')
        return "".join(parts)

    def labels(self, curves: Sequence[tuple[str, Sequence[Point]]]) -> list[str]:
        """Each curve's name beside its last point, moved apart where the two would overlap."""
        placed = [(name, self.place(points[-1])) for name, points in curves if points]
        if len(placed) == 2 and abs(placed[0][1][1] - placed[1][1][1]) < 14 and placed[0][1][0] > WIDTH - RIGHT - 60:
            (a, (ax, ay)), (b, (bx, by)) = placed
            middle, sign = (ay + by) / 2, 1 if ay > by else -1
            placed = [(a, (ax, middle + 7 * sign)), (b, (bx, middle - 7 * sign))]
        return [f'<text class="label {n}" x="{x + 9:.1f}" y="{y + 4:.1f}">{escape(n)}</text>' for n, (x, y) in placed]


def _central(points: Sequence[Point]) -> list[Point]:
    """The points but the most extreme per cent, which would flatten everything else."""
    ordered = sorted(points, key=lambda p: p[1])
    cut = len(ordered) // 200
    return ordered[cut : len(ordered) - cut]


def padded(low: float, high: float) -> tuple[float, float]:
    """The range with some room on both sides."""
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    """The picture around its parts; `label` is what a screen reader says."""
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg {size} role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
