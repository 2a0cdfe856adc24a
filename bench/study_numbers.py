"""What a study has measured so far, as numbers: of every row and seed, of every contrast.

Only finished runs count. A contrast takes the seeds that both of its rows have.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from study_bootstrap import Bootstrap, Difference, sentence_counts

from slicetune.engine.analyses.paired import holm, paired
from slicetune.engine.common.errors import UserError
from slicetune.engine.common.files import read_lines
from slicetune.engine.evaluation.results import dev_loss, translations

if TYPE_CHECKING:
    from study import Study

KEPT = ("trainable_parameters", "added_parameters", "learning_rate", "train_sentences", "tokens_per_second", "neurons")
KEPT += ("peak_memory_bytes", "seconds")

Scores = dict[str, dict[int, dict[str, np.ndarray]]]
"""Sentence counts by row, seed and domain."""


def collect(study: Study) -> dict[str, Any]:
    """rows, sweeps, contrasts, and how many runs are done."""
    plan, rows, counts = study.plan, {}, {}
    for job in plan.jobs:
        for row in job.rows:
            folders = {seed: study.folder(job.name, row.label, seed) for seed in plan.seeds}
            runs = {seed: _results(folder) for seed, folder in folders.items() if _done(folder)}
            if runs:
                rows[row.label] = _row(row.recipe, dict(row.flags), runs)
                counts[row.label] = {seed: _counts(folders[seed], run) for seed, run in runs.items()}
    parts = _parts(plan.parts, counts)
    return {
        "planned": sum(len(plan.seeds) if _trains(row.recipe) else 1 for row in plan.rows),
        "done": sum(len(row["seeds"]) for row in rows.values()),
        "parts": parts,
        "rows": rows,
        "rates": _rates(study),
        "against_base": _contrasts([(a, b) for b in _bases(rows) for a in rows if a != b], rows, counts, parts),
        "contrasts": _contrasts(plan.contrasts, rows, counts, parts),
    }


def _trains(recipe: str) -> bool:
    return not recipe.startswith("base_")


def _bases(rows: Mapping[str, Any]) -> list[str]:
    return [label for label, row in rows.items() if not _trains(row["recipe"])][:1]


def _done(folder: Path) -> bool:
    return (folder / "results.json").is_file()


def _results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def _row(recipe: str, flags: dict[str, Any], runs: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """A row of study-NAME.json: its settings, and of each seed what it cost and reached."""
    seeds = {}
    for seed, run in runs.items():
        scores = run["systems"][run["method"]]["domains"]
        seeds[str(seed)] = {
            **{key: run[key] for key in KEPT if key in run},
            **({"dev_loss": dev_loss(run)} if "sweep" in run else {}),
            "bleu": {domain: of["bleu"] for domain, of in scores.items()},
            "chrf": {domain: of["chrf"] for domain, of in scores.items()},
            "n": {domain: of["n"] for domain, of in scores.items()},
        }
    return {"recipe": recipe, "flags": flags, "seeds": seeds}


def _counts(folder: Path, run: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Sentence counts of a run's translations, by domain."""
    pair = json.loads((folder / "config.json").read_text(encoding="utf-8"))["data"]["pair"]
    found = {}
    for domain in (*run["seen"], *run["unseen"]):
        language = (domain.partition("/")[0] if "pairs" in run else pair).partition("-")[2]
        lines = (read_lines(translations(folder, kind, domain, language)) for kind in (run["method"], "reference"))
        found[domain] = sentence_counts(*lines, language)
    return found


def _parts(parts: Mapping[str, Sequence[str]], counts: Scores) -> dict[str, list[str]]:
    """The domains of each part that were measured, by their names in the runs (`de-en/law` of several directions)."""
    measured = list(dict.fromkeys(d for of in counts.values() for run in of.values() for d in run))
    named = {part: [d for d in measured if d.rpartition("/")[2] in of or d in of] for part, of in parts.items()}
    return {part: of for part, of in named.items() if of}


def _rates(study: Study) -> dict[str, Any]:
    """Of each row of the sweep the dev loss by learning rate."""
    if not study.plan.rates:
        return {}
    folders = {row.label: study.folder("rates", row.label, study.plan.seeds[0]) for row in study.plan.rates.rows}
    return {label: _results(folder)["sweep"] for label, folder in folders.items() if _done(folder)}


def _contrasts(
    pairs: Sequence[tuple[str, str]], rows: Mapping[str, Any], counts: Scores, parts: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """The pairs of rows that are both measured; each part's p-values are adjusted over the pairs (Holm)."""
    known = [(a, b) for a, b in pairs if a in rows and b in rows]
    found = [{"row": a, "against": b, **_contrast(rows[a], rows[b], counts[a], counts[b], parts)} for a, b in known]
    for part in parts:
        adjusted = holm([each["bleu"][part]["p"] for each in found])
        for each, p in zip(found, adjusted, strict=True):
            each["bleu"][part]["holm"] = p
    return found


def _contrast(one: Any, other: Any, mine: Any, theirs: Any, parts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """BLEU by parts, over sentences and seeds; the dev loss over seeds."""
    seeds = sorted(set(mine) & set(theirs))
    untrained = not (_trains(one["recipe"]) and _trains(other["recipe"]))  # it has one seed, which stands for all
    first, second = (sorted(of) if untrained else seeds for of in (mine, theirs))
    sizes = {domain: len(rows) for domain, rows in next(iter(mine.values())).items()}
    if any(len(of[d]) != n for each in (mine, theirs) for of in each.values() for d, n in sizes.items() if d in of):
        raise UserError("the rows of a contrast were measured on different test sentences: give the study a new --out")
    boot = Bootstrap(sizes, max(len(first), len(second)))
    a, b = boot.scores([mine[seed] for seed in first]), boot.scores([theirs[seed] for seed in second])
    differences: dict[str, Difference] = {part: boot.difference(a, b, domains) for part, domains in parts.items()}
    found = {"seeds": seeds, "bleu": {part: asdict(each) for part, each in differences.items()}}
    losses = [[of["seeds"][str(seed)].get("dev_loss") for seed in seeds] for of in (one, other)]
    if seeds and None not in losses[0] + losses[1]:
        found["dev_loss"] = asdict(paired(*(torch.tensor(of, dtype=torch.float64) for of in losses)))
    return found
