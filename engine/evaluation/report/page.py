"""The report's look: one style sheet and the few HTML pieces that its sections are made of. No script, no download."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --page: #fcfcfa; --text: #1d2125; --soft: #626b73; --line: #dfe2e4; --tint: #f1f3f3;
  --accent: #1f6f9c; --second: #c2571a; --good: #1c7a45; --bad: #b3372f; --third: #7a4fb0; --on: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --page: #15181b; --text: #e4e7e9; --soft: #9aa4ac; --line: #30363b;
  --tint: #1d2226; --accent: #64b1e0; --second: #f0a062; --good: #6cc48f; --bad: #ef8a80; --third: #b596e6;
  --on: #0d1114; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.55 system-ui, "Segoe UI", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .6rem; }
h3 { font-size: .95rem; margin: 0 0 .3rem; font-weight: 600; }
p { margin: .5rem 0; max-width: 44rem; }
.soft, figcaption, caption { color: var(--soft); font-size: .9rem; }
code, pre { font: .86em/1.5 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
pre { background: var(--tint); padding: .8rem 1rem; border-radius: 6px; overflow-x: auto; overflow-wrap: normal; }
dl.facts { display: flex; flex-wrap: wrap; gap: .8rem 2.4rem;
  margin: 1.6rem 0 0; padding: 1rem 0; border: solid var(--line); border-width: 1px 0; }
dl.facts dt { color: var(--soft); font-size: .85rem; }
dl.facts dd { margin: 0; font-size: 1.2rem; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .75rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: .2rem; }
thead th { color: var(--soft); font-weight: 500; font-size: .9rem; }
thead tr:last-child th { border-bottom: 1px solid var(--text); }
thead tr:first-child th[colspan] { text-align: center; }
tr.mean td { font-weight: 600; border-top: 1px solid var(--line); }
tr.all td { border-top: 1px solid var(--text); }
tr.mean + tr:not(.mean) td { padding-top: .9rem; }
.up { color: var(--good); } .down { color: var(--bad); }
table.bars { width: 100%; max-width: 44rem; } table.bars td:last-child { width: 60%; text-align: left; }
.bar { display: block; height: .7rem; min-width: 2px; background: var(--accent); border-radius: 2px; }
table.text td { white-space: normal; text-align: left; vertical-align: top; overflow-wrap: anywhere;
  border-top: 1px solid var(--line); }
table.text td:first-child { color: var(--soft); font-size: .9rem; white-space: nowrap; }
table.text tr.more td { border-top: 0; padding-top: 0; }
details { margin: .5rem 0; border-top: 1px solid var(--line); padding-top: .5rem; }
summary { cursor: pointer; }
figure { margin: .6rem 0 0; } .maps { display: flex; flex-wrap: wrap; gap: 1.6rem 2rem; align-items: flex-start; }
svg { display: block; max-width: 100%; height: auto; font: 11.5px system-ui, "Segoe UI", sans-serif; }
svg text { fill: var(--soft); } svg .name { text-anchor: middle; } svg .tick { text-anchor: end; }
svg .label { font-weight: 600; } svg .label.train { fill: var(--accent); } svg .label.dev { fill: var(--second); }
svg .grid { stroke: var(--line); } svg polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg polyline.train, svg polyline.raw { stroke: var(--accent); } svg polyline.raw { stroke-width: 1; opacity: .3; }
svg polyline.dev { stroke: var(--second); } svg circle.dev { fill: var(--second); }
svg .s0 { --c: var(--accent); } svg .s1 { --c: var(--second); } svg .s2 { --c: var(--good); }
svg .s3 { --c: var(--third); } svg .s4 { --c: var(--bad); } svg .s5 { --c: var(--soft); }
svg polyline[class^=s], svg line[class^=s] { stroke: var(--c); stroke-width: 2; }
svg circle[class^=s], svg rect[class^=s] { fill: var(--c); } svg text.label { fill: var(--c, var(--soft)); }
svg .faint { fill: var(--accent); opacity: .35; } svg .mark { stroke: var(--text); stroke-dasharray: 4 3; }
svg .none { fill: var(--tint); } svg .cell { fill: var(--accent); }
svg .weak, svg .strong { text-anchor: middle; font-size: 10.5px; fill: var(--text); } svg .strong { fill: var(--on); }
@media print { details { break-inside: avoid; } main { max-width: none; } }
"""


def page(title: str, body: Iterable[str]) -> str:
    """A whole document around the sections, the empty ones left out."""
    inside = "\n".join(part for part in body if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{inside}\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading with what follows it, or nothing where nothing follows."""
    inside = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{inside}\n</section>" if inside else ""


def table(head: str, rows: Iterable[tuple[str, Sequence[str]]], kind: str = "") -> str:
    """A table of (row class, cells); `head` is its <tr>…</tr> and cells are HTML already."""
    body = "\n".join(f"<tr{_class(mark)}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for mark, cells in rows)
    top = f"<thead>{head}</thead>" if head else ""
    return f'<div class="scroll"><table{_class(kind)}>{top}<tbody>\n{body}\n</tbody></table></div>'


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Name and number, side by side."""
    inside = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="facts">{inside}</dl>'


def details(title: str, inside: str) -> str:
    """Collapsed until it is asked for."""
    return f"<details><summary>{escape(title)}</summary>\n{inside}\n</details>" if inside else ""


def change(value: float) -> str:
    """A difference with its sign, green or red."""
    text = f"{value:+.2f}".replace("-", "−")
    kind = "up" if value >= 0.005 else "down" if value <= -0.005 else ""
    return f'<span class="{kind}">{text}</span>' if kind else text.replace("−", "").replace("+", "")


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table for a terminal as lines: first column to the left, others to the right; an empty row is a rule."""
    widths = [max(len(row[i]) for row in rows if row) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        if not row:
            lines.append("-" * (sum(widths) + 2 * len(widths) - 2))
            continue
        (name, width), *numbers = zip(row, widths, strict=True)
        lines.append("  ".join([name.ljust(width), *(cell.rjust(width) for cell, width in numbers)]))
    return lines
