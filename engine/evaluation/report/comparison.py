"""A comparison's tables for reading: terminal, Markdown, and report.html with a figure of every seed."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ...data.languages import DOMAINS
from ..comparison import LEVEL, RESAMPLES, Cell, Row, Table
from . import page
from .page import aligned

NOTE = (
    "Means over seeds ± sample standard deviation where there are several. ¹ and ² mark the best and the second best "
    f"of a column, * what differs from the base at p < {LEVEL:g} (paired bootstrap of the first seed, {RESAMPLES:,} "
    "resamples a domain, not corrected for the number of comparisons)."
)
MARKS = {0: "", 1: "¹", 2: "²"}


def terminal(tables: Sequence[Table]) -> str:
    """Aligned columns; the marks of NOTE behind the numbers."""
    return "\n\n".join(["\n".join(_lines(table)) for table in tables] + [NOTE])


def _lines(table: Table) -> list[str]:
    rows = [[title, *map(_plain, cells)] for title, cells in table.rows]
    return aligned([[table.title, *map(_name, table.head)], [], *rows])


def _plain(cell: Cell) -> str:
    return f"{cell.text}{MARKS[cell.rank]}{'*' if cell.significant else ''}"


def _name(column: str) -> str:
    return DOMAINS.get(column, column)


def markdown(tables: Sequence[Table]) -> str:
    """Tables for a README or an issue: the best of a column bold, the second best in italics."""
    parts = []
    for table in tables:
        rows = [[table.title, *map(_name, table.head)], ["---", *["---:"] * len(table.head)]]
        rows += [[title, *map(_emphasised, cells)] for title, cells in table.rows]
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    note = note_with("Bold and italics").replace("*", "\\*")
    return "\n\n".join([*parts, note]) + "\n"


def note_with(marks: str) -> str:
    """NOTE of a page that marks best and second best otherwise."""
    return NOTE.replace("¹ and ²", marks, 1)


def _emphasised(cell: Cell) -> str:
    text = {1: f"**{cell.text}**", 2: f"*{cell.text}*"}.get(cell.rank, cell.text)
    return text + ("\\*" if cell.significant else "")


def html(title: str, subtitle: str, tables: Sequence[Table], rows: Sequence[Row]) -> str:
    """One file that needs nothing beside it; empty lines part the paragraphs of `subtitle`."""
    body = [f"<h1>{escape(title)}</h1>", *(f'<p class="soft">{escape(part)}</p>' for part in subtitle.split("\n\n"))]
    body += [page.section(table.title, _html_table(table)) for table in tables]
    body += [
        f'<p class="soft">{escape(note_with("Bold and underlined"))}</p>',
        page.section("BLEU of every seed", seeds_chart(rows)),
    ]
    return page.page(title, body)


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in ["", *map(_name, table.head)])
    return page.table(f"<tr>{head}</tr>", [("", [escape(title), *map(_html, cells)]) for title, cells in table.rows])


def _html(cell: Cell) -> str:
    tag = {1: "b", 2: "u"}.get(cell.rank)
    text = escape(cell.text) + ("*" if cell.significant else "")
    return f"<{tag}>{text}</{tag}>" if tag else text


def seeds_chart(rows: Sequence[Row], width: int = 640, step: int = 28, left: int = 150) -> str:
    """A line a method: a filled dot a seed for the mean over seen domains, an open one for the unseen."""
    points = [
        (i, kind, v) for i, row in enumerate(rows) for kind in ("seen", "unseen") for v in row.values("bleu", kind)
    ]
    if not points:
        return ""
    low, high = min(v for *_, v in points), max(v for *_, v in points)
    scale = (width - left - 40) / ((high - low) or 1.0)
    parts = [
        f'<svg viewBox="0 0 {width} {step * len(rows) + 30}" width="{width}" role="img" aria-label="BLEU by seed">'
    ]
    for i, row in enumerate(rows):
        y = step * i + step / 2
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 20}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{left - 10}" y="{y + 4}">{escape(row.title)}</text>')
    for i, kind, value in points:
        x, y = left + 10 + (value - low) * scale, step * i + step / 2
        look = 'fill="var(--accent)"' if kind == "seen" else 'fill="none" stroke="var(--second)" stroke-width="2"'
        parts.append(f'<circle cx="{x:.1f}" cy="{y}" r="5" {look}><title>{kind}: {value:.2f}</title></circle>')
    base = step * len(rows) + 20
    parts += [f'<text x="{left + 10}" y="{base}">{low:.1f}</text>']
    parts += [f'<text class="tick" x="{width - 20}" y="{base}">{high:.1f} BLEU</text></svg>']
    caption = "<figcaption>Filled: mean over the seen domains; open: over the unseen ones.</figcaption>"
    return f"<figure>{''.join(parts)}{caption}</figure>"
