"""Write RESULTS.md and its plots from results/*.json: tables, and which target is met.

python bench/report.py --plots              # bench/RESULTS.md, with plots
python bench/report.py FOLDER               # FOLDER/results/*.json → FOLDER/RESULTS.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plots
from targets import TARGETS

BENCH = Path(__file__).resolve().parent

Row = dict[str, Any]
MEMORY = (
    ("resident_bytes", "held"),
    ("peak_bytes", "peak"),
    ("saved_bytes", "saved"),
    ("optimizer_bytes", "optimizer"),
)


class Results:
    """One JSON file: rows by suite and setting, in the order in which they were measured."""

    def __init__(self, path: Path) -> None:
        whole = json.loads(path.read_text())
        self.path, self.mode, self.files = path, whole["mode"], whole["files"]
        self.tests: dict[str, str] = whole.get("tests", {})
        self.rows: list[Row] = [row for file in self.files.values() for row in file["rows"]]
        self.provenance = next((f["provenance"] for f in self.files.values() if f["provenance"]), {})

    @property
    def name(self) -> str:
        device = self.provenance.get("device", "?")
        what = {"cpu": self.provenance.get("cpu", "CPU"), "gpu": device, "gpu-peers": f"{device}, other libraries"}
        return what[self.mode]

    def tables(self) -> Iterator[tuple[str, str, list[Row]]]:
        keys = dict.fromkeys((row["suite"], row["setting"]) for row in self.rows)
        for suite, setting in keys:
            yield suite, setting, [r for r in self.rows if (r["suite"], r["setting"]) == (suite, setting)]


def load(folder: Path) -> list[Results]:
    """The benchmarks' files (the compiler's report lies beside them)."""
    files = sorted((folder / "results").glob("*.json"))
    return [Results(path) for path in files if "files" in json.loads(path.read_text())]


def seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size or unit == "µs":
            return f"{value / size:.3g} {unit}"
    raise AssertionError


def size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def ceilings(rows: list[Row]) -> tuple[float, float]:
    """Bytes and operations a second of the copy and of the matrix product in a table; 0 where it has none."""
    timed = [row for row in rows if "seconds" in row and row["kind"] == "floor"]
    copy = next((row["bytes"] / row["seconds"] for row in timed if row["name"] == "copy"), 0.0)
    product = max((row["flops"] / row["seconds"] for row in timed if "flops" in row), default=0.0)
    return copy, product


def cells(row: Row, rows: list[Row], columns: list[str]) -> list[str]:
    """One line of a table. Times are medians with the 20th and 80th percentile; ratios are to the first row."""
    if "error" in row:
        return [row["name"], f"not measured: {row['error']}", *[""] * (len(columns) - 2)]
    copy, product = ceilings(rows)
    found = {
        "contender": row["name"],
        "time": f"{seconds(row['seconds'])} ({seconds(row['low'])} – {seconds(row['high'])})",
    }
    base = next((r for r in rows if r["kind"] in ("floor", "ours") and "seconds" in r), row)
    found["time ÷ first"] = f"{row['seconds'] / base['seconds']:.2f}"
    if "bytes" in row:
        rate = row["bytes"] / row["seconds"]
        found["GB/s"] = f"{rate / 1e9:.3g}"
        found["of copy"] = f"{rate / copy:.0%}" if copy else ""
    if "flops" in row:
        rate = row["flops"] / row["seconds"]
        found["TFLOP/s"] = f"{rate / 1e12:.3g}"
        found["of product"] = f"{rate / product:.0%}" if product else ""
    found |= {title: size(row[field]) for field, title in MEMORY if field in row}
    if "trainable" in row:
        found["trained"] = f"{row['trainable'] / 1e6:.2f} M"
    if "sentences_per_second" in row:
        found["sentences/s"] = f"{row['sentences_per_second']:.3g}"
    if row.get("growth"):
        found["above it, by sentences"] = ", ".join(f"{n}: {size(b)}" for n, b in row["growth"].items())
    found["note"] = row.get("note", "")
    return [found.get(column, "") for column in columns]


def columns_of(rows: list[Row]) -> list[str]:
    def some(field: str) -> bool:
        return any(row.get(field) for row in rows)

    wanted = ["contender", "time", "time ÷ first"]
    wanted += ["GB/s", "of copy"] if some("bytes") else []
    wanted += ["TFLOP/s", "of product"] if some("flops") else []
    wanted += [title for field, title in MEMORY if some(field)]
    wanted += ["trained"] if some("trainable") else []
    wanted += ["sentences/s"] if some("sentences_per_second") else []
    wanted += ["above it, by sentences"] if some("growth") else []
    return wanted + (["note"] if some("note") else [])


def table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows) + "\n"


def provenance(results: Results) -> str:
    about = results.provenance
    versions = " ".join(f"{name} {v}" for name, v in about.get("versions", {}).items() if v)
    parts = [f"{about.get('cpu')}, {about.get('threads')} of {about.get('cores')} cores, load {about.get('load')}"]
    if about.get("driver"):
        parts.insert(0, f"{about['device']}, driver {about['driver']}, CUDA {about['cuda']}")
    parts += [f"Python {about.get('python')} {versions}", f"commit {about.get('commit')}", str(about.get("date"))]
    text = f"Measured on: {'; '.join(parts)}.\n"
    if about.get("smoke"):
        text = "**A smoke run: shapes are tiny and times mean nothing.**\n\n" + text
    for file, each in results.files.items():
        text += f"\n`{file}` failed: {each['failure']}.\n" if each["failure"] else ""
    for test, how in results.tests.items():
        text += f"\n{test}: {how}.\n"
    return text


def target_table(everything: list[Results]) -> str:
    """Every target of the project on every machine that has results for it."""
    lines = []
    for target in TARGETS:
        found = [r for r in everything if r.mode == target.mode]
        for results in found:
            measured, met = target.verdict(results.rows)
            smoke = results.provenance.get("smoke")
            lines.append([target.text, results.name, measured, "smoke run" if smoke else met])
        if not found:
            lines.append([target.text, "a GPU", "not measured: none was at hand", ""])
    return table(["target", "on", "measured", "met"], lines)


def section(results: Results, folder: Path, draw: bool) -> str:
    text = f"## {results.name}\n\n{provenance(results)}\n"
    for file in plots.draw(results.path.stem, list(results.tables()), folder / "results") if draw else ():
        text += f"![{file.stem}](results/{file.name})\n"
    for suite, setting, rows in results.tables():
        columns = columns_of(rows)
        text += f"\n### {suite}\n\n{setting}\n\n{table(columns, [cells(row, rows, columns) for row in rows])}"
    return text


INTRODUCTION = """# Benchmarks

Generated by `make bench`, `make gpu-record` and `make gpu-peers` (`bench/report.py`) from `bench/results/*.json`; do
not edit. Contenders of one table ran in one process (Liger's patch in one of its own) and took turns, round after
round; each had passed its check of what it computes before it was timed. A time is the median over rounds (20th to 80th
percentile): on a shared machine ratios within a table mean something, absolute times less. `held` is what lives from
step to step, `peak` the most that a step reaches, `saved` what autograd keeps for the backward; all are bytes of
tensors that the method would need alone.
What kernels cost in registers and bytes on parts that were not at hand is in [results/kernels.md](results/kernels.md).
"""


def write(folder: Path, draw: bool) -> Path:
    everything = load(folder)
    text = f"{INTRODUCTION}\n## Targets\n\n{target_table(everything)}"
    text += "".join("\n" + section(results, folder, draw) for results in everything)
    path = folder / "RESULTS.md"
    path.write_text(text)
    return path


if __name__ == "__main__":
    folders = [Path(argument) for argument in sys.argv[1:] if argument != "--plots"]
    write(folders[0] if folders else BENCH, "--plots" in sys.argv)
