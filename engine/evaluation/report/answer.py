"""What an analysis leaves: tables in the terminal and as CSV, and one page with its figures, in the report's look;
the figures stand in the run's report too.

write(run, "overlap", "Overlap of sets", "What it shows.", [Table("jaccard", columns, rows)], [Figure(title, svg)])
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ...common.errors import UserError
from ...common.files import whole_file, write_json, write_text
from . import page
from .page import aligned
from .run import write_report


@dataclass
class Table:
    """Rows of text and numbers; the CSV has them in full, the page and the terminal with `digits` after the point."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""
    digits: int = 2
    shown: bool = True
    """False: the CSV alone has it."""


@dataclass
class Figure:
    """An inline SVG with what stands above and below it."""

    title: str
    svg: str
    caption: str = ""


def folder_of(run: str | os.PathLike[str]) -> Path:
    """`RUN/analyses`, made if it is not there. Raises UserError where RUN is no folder."""
    if not Path(run).is_dir():
        raise UserError(f"{run}: no such folder; name the --out of a run")
    folder = Path(run) / "analyses"
    folder.mkdir(exist_ok=True)
    return folder


def write(
    run: str | os.PathLike[str],
    name: str,
    title: str,
    words: str,
    tables: Sequence[Table],
    figures: Sequence[Figure] = (),
) -> Path:
    """Print the tables, write `RUN/analyses/<name>-<table>.csv` of each, `<name>.html`, and its figures as
    `<name>.json`; returns the page's path.

    A run's report is written again, with the figures in it.
    """
    folder = folder_of(run)
    for table in tables:
        write_csv(folder / f"{name}-{table.name}.csv", table)
        if table.shown:
            print(f"\n{table.title or title}\n{text(table)}")
    print(f"\n{words}", flush=True)
    body = [f"<h1>{escape(title)}</h1>", f'<p class="soft">{escape(str(Path(run)))}</p>', f"<p>{escape(words)}</p>"]
    drawn = [(figure.title, _figure(figure)) for figure in figures if figure.svg]
    body += [page.section(*one) for one in drawn]
    body += [page.section(table.title or title, html(table)) for table in tables if table.shown]
    path = folder / f"{name}.html"
    write_text(path, page.page(title, body))
    write_json(path.with_suffix(".json"), {"title": title, "figures": drawn})
    print(f"→ {path}", flush=True)
    if all((Path(run) / name).is_file() for name in ("config.json", "report.html")):  # a comparison has no settings
        write_report(run)
    return path


def write_csv(path: Path, table: Table) -> None:
    """Numbers in full, an empty field for None; complete or not at all."""
    with whole_file(path) as unfinished, open(unfinished, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table.columns)
        writer.writerows(table.rows)


def text(table: Table) -> str:
    """The table for a terminal: first column to the left, others to the right."""
    rows = [[_cell(value, table.digits) for value in row] for row in table.rows]
    return "\n".join(aligned([list(table.columns), [], *rows]))


def html(table: Table) -> str:
    """The table for the page."""
    head = "<tr>" + "".join(f"<th>{escape(name)}</th>" for name in table.columns) + "</tr>"
    return page.table(head, (("", [escape(_cell(value, table.digits)) for value in row]) for row in table.rows))


def _cell(value: Any, digits: int) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.{digits}f}".replace("-", "−")
    return f"{value:,}" if isinstance(value, int) else str(value)


def _figure(figure: Figure) -> str:
    caption = f"<figcaption>{escape(figure.caption)}</figcaption>" if figure.caption else ""
    return f"<figure>{figure.svg}{caption}</figure>"
