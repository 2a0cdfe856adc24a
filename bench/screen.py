"""What a run prints: as much of it as is read first on a lent machine, the table of targets always."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from report import ceilings, seconds
from targets import TARGETS

Row = dict[str, Any]
MOST = 11_500
"""Characters of a run. The end of the output is what is seen, 12,000 characters of it."""
TARGETS_HAVE = 4_500


class Screen:
    """Prints until its characters are used up; what is left out is named, and is in the log."""

    def __init__(self, most: int = MOST - TARGETS_HAVE) -> None:
        self.left = most
        self.silent = False

    def say(self, text: str) -> None:
        if self.left < len(text) + 1:
            if not self.silent:
                print("… (more is in the log and in RESULTS.md)", flush=True)
            self.silent = True
            return
        self.left -= len(text) + 1
        print(text, flush=True)


def tables(rows: list[Row]) -> str:
    """Every suite's rows, a line each: time, its ratio to the first row, share of the copy."""
    lines = []
    for suite, setting in dict.fromkeys((row["suite"], row["setting"]) for row in rows):
        mine = [row for row in rows if (row["suite"], row["setting"]) == (suite, setting)]
        lines += [f"[{suite}] {setting}", *(line(row, mine) for row in mine)]
    return "\n".join(lines)


def line(row: Row, table: list[Row]) -> str:
    name = row["name"] if len(row["name"]) <= 42 else row["name"][:41] + "…"
    if "error" in row:
        return f"  {name:42} {row['error'][:60]}"
    copy, _ = ceilings(table)
    base = next((r["seconds"] for r in table if "error" not in r), row["seconds"])
    share = f"{row['bytes'] / row['seconds'] / copy:5.0%} of copy" if copy and "bytes" in row else ""
    return f"  {name:42} {seconds(row['seconds']):>8} {row['seconds'] / base:6.2f}× {share}".rstrip()


def targets(rows: list[Row], mode: str) -> str:
    """Met or not, and what was measured, a line each."""
    lines = []
    for target in (target for target in TARGETS if target.mode == mode):
        measured, met = target.verdict(rows)
        if measured.startswith("not measured"):
            measured, met = "not measured", "-"
        lines.append(f"  {met.strip('*'):3} {measured[:60]:14} {target.text}")
    return "\n".join(["[targets]", *lines])


def tail(log: Path, begin: int, lines: int, width: int = 150) -> str:
    """The last lines of a log, from the byte `begin` on."""
    with log.open("rb") as file:
        file.seek(begin)
        text = file.read().decode(errors="replace")
    return "\n".join("  | " + each[:width] for each in text.splitlines()[-lines:])
