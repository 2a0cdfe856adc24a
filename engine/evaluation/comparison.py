"""The table of a comparison: every method's runs, one a seed, as means with deviations, ranks and significance.

rows = [Row("base", "Base", [results]), Row("caneft", "CANEFT", [results_of_seed_0, results_of_seed_1])]
tables(rows, p_values(rows))             # scores and costs; report/comparison.py draws them
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.files import read_lines
from .bleu import tokenizer_name
from .results import dev_loss, translations

LEVEL = 0.05
"""A p-value below it marks a cell."""
RESAMPLES = 1000
"""Of the paired bootstrap."""
METRICS = (("bleu", "BLEU"), ("bleu_13a", "BLEU, tok 13a throughout"), ("chrf", "chrF"), ("comet", "COMET"))
PARTS = ("seen", "unseen", "all")


@dataclass
class Row:
    """A method: `runs` has the content of results.json of each seed, `folders` where they lie."""

    label: str
    title: str
    runs: list[dict[str, Any]]
    folders: list[Path]

    @property
    def systems(self) -> list[dict[str, Any]]:
        """Scores of the system that each run is about."""
        return [run["systems"][run["method"]] for run in self.runs]

    def values(self, metric: str, column: str) -> list[float]:
        """One number a seed: of a domain, or of the mean over a direction's or `seen`, `unseen` or `all` domains."""
        kinds = ("averages",) if column in PARTS else ("domains", "pairs")
        found = (_score(system, kind, column, metric) for system in self.systems for kind in kinds)
        return [value for value in found if value is not None]


def _score(system: Mapping[str, Any], kind: str, column: str, metric: str) -> float | None:
    """A number of results.json. BLEU is that of 13a already, but where BLEU of 13a stands beside it in the run."""
    scores = system.get(kind, {}).get(column, {})
    if metric == "bleu_13a" and any(metric in means for means in system["averages"].values()):
        return scores.get(metric, scores.get("bleu"))
    return scores.get(metric)


@dataclass(frozen=True)
class Cell:
    """A number of the table. `rank` is 1 or 2 for the best and second best of a column, else 0."""

    text: str
    rank: int = 0
    significant: bool = False
    """Differs from the base's at LEVEL, by paired bootstrap."""


@dataclass
class Table:
    title: str
    head: list[str]
    rows: list[tuple[str, list[Cell]]]


def mean_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and the sample standard deviation (n - 1); NaN where there are fewer than two values.

    A dev loss is infinite without dev sentences, and has no deviation then.
    """
    if not values:
        return math.nan, math.nan
    spread = len(values) > 1 and all(map(math.isfinite, values))
    return statistics.fmean(values), statistics.stdev(values) if spread else math.nan


def ranks(values: Sequence[float]) -> list[int]:
    """1 for the highest value, 2 for the second highest, 0 for the rest and for NaN; equal values share a rank."""
    known = sorted({value for value in values if not math.isnan(value)}, reverse=True)[:2]
    return [known.index(value) + 1 if value in known else 0 for value in values]


def columns(rows: Sequence[Row]) -> list[str]:
    """Seen domains, their mean, unseen domains, their mean, the mean of all; of several directions each one's mean."""
    first = rows[0].runs[0]
    seen, unseen = first["seen"], first["unseen"]
    if "pairs" in first:
        return [*first["pairs"], *(["seen", "unseen"] if unseen else []), "all"]
    return [*seen, "seen", *unseen, *(["unseen", "all"] if unseen else [])]


def tables(rows: Sequence[Row], significance: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[Table]:
    """Scores, a table for each metric that any run has, then costs; p-values by metric, label and domain."""
    found = [
        _scores(rows, metric, name, significance.get(metric, {}))
        for metric, name in METRICS
        if any(row.values(metric, column) for row in rows for column in columns(rows))
    ]
    return [*found, costs(rows)]


def _scores(rows: Sequence[Row], metric: str, name: str, p: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(name, columns(rows), [(row.title, []) for row in rows])
    for column in table.head:
        stats = [mean_deviation(row.values(metric, column)) for row in rows]
        places = ranks([round(mean, 2) for mean, _ in stats])
        for row, (_, cells), (mean, deviation), rank in zip(rows, table.rows, stats, places, strict=True):
            text = "-" if math.isnan(mean) else f"{mean:.2f}"
            text += "" if math.isnan(deviation) else f" ± {deviation:.2f}"
            cells.append(Cell(text, rank, p.get(row.label, {}).get(column, 1.0) < LEVEL))
    return table


def costs(rows: Sequence[Row]) -> Table:
    """What each method trains and takes; times and memory are means over seeds."""
    head = ["trained", "added", "sentences", "rate", "dev loss", "peak memory", "tokens/s", "training", "all stages"]
    table = Table("Cost", head, [])
    for row in rows:
        first = row.runs[0]
        if "learning_rate" not in first:
            table.rows.append((row.title, [Cell(text) for text in ["0", "0", *["-"] * (len(head) - 2)]]))
            continue
        rate = first["learning_rate"]
        numbers = [statistics.fmean(run[key] for run in row.runs) for key in ("peak_memory_bytes", "tokens_per_second")]
        loss, _ = mean_deviation([dev_loss(run) for run in row.runs])
        seconds = [run["seconds"] for run in row.runs]
        texts = [f"{statistics.fmean(run['trainable_parameters'] for run in row.runs):,.0f}"]
        texts += [f"{first['added_parameters']:,}", f"{first['train_sentences']:,}", f"{rate:g}"]
        texts += [f"{loss:.4f}" if math.isfinite(loss) else "-"]
        texts += [f"{numbers[0] / 1e9:.2f} GB", f"{numbers[1]:,.0f}"]
        texts += [f"{statistics.fmean(s['train'] for s in seconds):,.0f} s"]
        texts += [f"{statistics.fmean(sum(s.values()) for s in seconds):,.0f} s"]
        table.rows.append((row.title, [Cell(text) for text in texts]))
    return table


def p_values(rows: Sequence[Row], target: str, smooth: str = "exp") -> dict[str, dict[str, dict[str, float]]]:
    """Paired bootstrap (Koehn 2004; sacreBLEU's) of each row's first seed against the base, column by column.

    By metric, label and column: a domain, or a direction with the sentences of all its domains. `target` is the target
    language where there is one direction; `smooth` is that of the scores' BLEU. Empty where no row is the untrained
    model's, or no other is there.
    """
    from sacrebleu.metrics import BLEU, CHRF
    from sacrebleu.significance import PairedTest

    others = [row for row in rows if row.runs[0]["method"] != "base"]
    bases = [row for row in rows if row.runs[0]["method"] == "base"]
    if not bases or not others:
        return {}
    found: dict[str, dict[str, dict[str, float]]] = {n: {row.label: {} for row in others} for n in ("bleu", "chrf")}
    pairs = bases[0].runs[0].get("pairs", {})
    for column in (c for c in columns(rows) if c not in PARTS):
        names, language = pairs.get(column, [column]), column.partition("-")[2] if pairs else target
        named = [(row.label, _lines(row, row.runs[0]["method"], names, language)) for row in (*bases, *others)]
        references = _lines(bases[0], "reference", names, language)
        metrics = {"bleu": BLEU(tokenize=tokenizer_name(language), smooth_method=smooth), "chrf": CHRF()}
        _, results = PairedTest(named, metrics, [references], test_type="bs", n_samples=RESAMPLES)()
        del results["System"]  # what is left are the metrics, in their order, by sacreBLEU's names
        for name, (base, *tested) in zip(metrics, results.values(), strict=True):
            for row, result in zip(others, tested, strict=True):
                same = result.score == base.score  # sacreBLEU would call a difference of nothing significant
                found[name][row.label][column] = 1.0 if same else float(result.p_value)
    return found


def _lines(row: Row, system: str, names: Sequence[str], language: str) -> list[str]:
    """A system's translations of the named domains, one after the other."""
    files = (translations(row.folders[0], system, name, language) for name in names)
    return [line for file in files for line in read_lines(file)]


def as_json(rows: Sequence[Row], significance: Mapping[str, Any]) -> str:
    """results.json of a comparison: every run's results, means and deviations by column, p-values against the base."""
    content = {"columns": columns(rows), "p_values": significance, "rows": {}}
    for row in rows:
        summary = {
            metric: {column: mean_deviation(row.values(metric, column)) for column in content["columns"]}
            for metric, _ in METRICS
            if row.values(metric, "all") or row.values(metric, "seen")
        }
        content["rows"][row.label] = {"title": row.title, "mean_deviation": summary, "runs": row.runs}
        content["rows"][row.label]["folders"] = [str(folder) for folder in row.folders]
    return json.dumps(_without_nan(content), indent=1)


def _without_nan(value: Any) -> Any:
    """JSON has neither NaN nor infinity: null."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
