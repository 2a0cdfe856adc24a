"""What a study has measured so far, as numbers: of every row and seed, of every contrast.

Only finished runs with the plan's settings count. A contrast takes the seeds that both of its rows have.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from study_bootstrap import Bootstrap, Difference, sentence_counts
from study_plan import Job, Row, start
from study_settings import stale

from slicetune.engine.analyses.paired import holm, paired
from slicetune.engine.common.files import read_json, read_lines
from slicetune.engine.evaluation.results import dev_loss, translations
from slicetune.engine.run import status

if TYPE_CHECKING:
    from study import Study

KEPT = ("trainable_parameters", "added_parameters", "learning_rate", "train_sentences", "tokens_per_second", "neurons")
KEPT += ("peak_memory_bytes", "seconds")

Counts = dict[int, dict[str, np.ndarray]]
"""A row's sentence counts by seed and domain."""


def collect(study: Study) -> dict[str, Any]:
    """rows, sweeps, contrasts, and how many runs are done; all of it can be written as JSON.

    Says once which runs are finished with other settings than the plan's: they are not counted.
    """
    plan, rows, counts, left = study.plan, {}, {}, []
    for job in plan.jobs:
        for row in job.rows:
            folders = _finished(study, job, row, left)
            if folders:
                runs = {seed: read_json(folder / "results.json") for seed, folder in folders.items()}
                rows[row.label] = _row(row.recipe, dict(row.flags), runs)
                counts[row.label] = {seed: _counts(folders[seed], run) for seed, run in runs.items()}
    if left:
        print(f"not counted, {len(left)} run(s) of other settings or not whole: {left[0]}", file=sys.stderr, flush=True)
    parts, bases = _parts(plan.parts, counts), _bases(study)
    against = [(a, b) for b in bases[:1] for a in rows if a not in bases and b in rows]
    return {
        "planned": sum(len(_seeds(study, job, row)) for job in plan.jobs for row in job.rows),
        "done": sum(len(row["seeds"]) for row in rows.values()),
        "fingerprint": _fingerprint(study),
        "parts": parts,
        "rows": rows,
        "rates": _rates(study),
        "against_base": _contrasts(against, rows, counts, parts, bases),
        "contrasts": _contrasts(plan.contrasts, rows, counts, parts, bases),
    }


def _seeds(study: Study, job: Job, row: Row) -> Sequence[int]:
    """Those that a row is run with: a base with the first, unless it starts from another model each time."""
    return study.plan.seeds[:1] if row.label in _bases(study) else study.plan.seeds


def _bases(study: Study) -> list[str]:
    """Rows that are the untrained model, of which one seed stands for all."""
    return [
        r.label for job in study.plan.jobs for r in job.rows if study.configs[r.label].method.is_base and not job.after
    ]


def _finished(study: Study, job: Job, row: Row, left: list[str]) -> dict[int, Path]:
    """Folders of a row's finished runs by seed; those of other settings, or tried again in vain, go to `left`."""
    found = {}
    started = _started(study, job, row)
    for seed in _seeds(study, job, row):
        folder = study.folder(job.name, row.label, seed)
        if not _done(folder) or seed not in started:
            continue
        state = status.read(folder).get("state", "complete")
        if differs := f"its last try is {state}" if state != "complete" else stale(study, job, row, folder):
            left.append(f"{folder} ({differs})")
        else:
            found[seed] = folder
    return found


def _started(study: Study, job: Job, row: Row) -> Collection[int]:
    """Seeds for which the model is there, and counted, that the row starts from."""
    for before in study.plan.jobs:
        for each in before.rows:
            if before.name == job.after and each.label == start(job, row):
                return _finished(study, before, each, [])
    return study.plan.seeds


def _fingerprint(study: Study) -> str:
    """The base model's, as the first finished run that started from it has kept it; empty where none has."""
    for job in study.plan.jobs:
        for folder in (study.folder(job.name, row.label, s) for row in job.rows for s in study.plan.seeds):
            if not job.after and _done(folder) and (stages := folder / "stages.json").is_file():
                return next(iter(read_json(stages).values()))["settings"]["model"]
    return ""


def _done(folder: Path) -> bool:
    return (folder / "results.json").is_file()


def _row(recipe: str, flags: dict[str, Any], runs: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """A row of study-NAME.json: its settings, and of each seed what it cost and reached."""
    seeds = {}
    for seed, run in runs.items():
        scores = run["systems"][run["method"]]["domains"]
        seeds[str(seed)] = {
            **{key: run[key] for key in KEPT if key in run},
            **({"dev_loss": loss} if "sweep" in run and math.isfinite(loss := dev_loss(run)) else {}),
            "bleu": {domain: of["bleu"] for domain, of in scores.items()},
            "chrf": {domain: of["chrf"] for domain, of in scores.items()},
            "n": {domain: of["n"] for domain, of in scores.items()},
        }
    return {"recipe": recipe, "flags": flags, "seeds": seeds}


def _counts(folder: Path, run: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Sentence counts of a run's translations, by domain."""
    pair = read_json(folder / "config.json")["data"]["pair"]
    found = {}
    for domain in (*run["seen"], *run["unseen"]):
        language = (domain.partition("/")[0] if "pairs" in run else pair).partition("-")[2]
        lines = (read_lines(translations(folder, kind, domain, language)) for kind in (run["method"], "reference"))
        found[domain] = sentence_counts(*lines, language)
    return found


def _parts(parts: Mapping[str, Sequence[str]], counts: Mapping[str, Counts]) -> dict[str, list[str]]:
    """The domains of each part that were measured, by their names in the runs (`de-en/law` of several directions)."""
    measured = list(dict.fromkeys(d for of in counts.values() for run in of.values() for d in run))
    named = {part: [d for d in measured if d.rpartition("/")[2] in of or d in of] for part, of in parts.items()}
    return {part: of for part, of in named.items() if of}


def _rates(study: Study) -> dict[str, Any]:
    """Of each row of the sweep the dev loss by learning rate."""
    if not study.plan.rates:
        return {}
    folders = {row.label: study.folder("rates", row.label, study.plan.seeds[0]) for row in study.plan.rates.rows}
    sweeps = {label: read_json(folder / "results.json") for label, folder in folders.items() if _done(folder)}
    return {
        label: {rate: loss if math.isfinite(loss) else None for rate, loss in found.get("sweep", {}).items()}
        for label, found in sweeps.items()
    }


def _contrasts(
    pairs: Sequence[tuple[str, str]],
    rows: Mapping[str, Any],
    counts: Mapping[str, Counts],
    parts: Mapping[str, Sequence[str]],
    bases: Sequence[str],
) -> list[dict[str, Any]]:
    """The pairs of rows that have a seed in common; each column's p-values are adjusted over the pairs (Holm)."""
    found = []
    for a, b in pairs:
        if a in rows and b in rows and (seeds := _common(counts[a], counts[b], a in bases, b in bases)):
            bleu = {part: asdict(each) for part, each in _contrast(counts[a], counts[b], seeds, parts).items()}
            trained = [second if a in bases else first for first, second in seeds]
            found.append({"row": a, "against": b, "seeds": trained, "bleu": bleu, **_losses(rows[a], rows[b], trained)})
    for part in parts:
        _adjust([each["bleu"][part] for each in found])
    _adjust([loss for each in found if (loss := each.get("dev_loss")) and loss["p"] is not None])
    return found


def _adjust(differences: Sequence[dict[str, Any]]) -> None:
    """Give each its p adjusted over all of them."""
    for each, p in zip(differences, holm([each["p"] for each in differences]), strict=True):
        each["holm"] = p


def _common(mine: Counts, theirs: Counts, one: bool, other: bool) -> list[tuple[int, int]]:
    """Seeds of both that are compared with each other; a base (`one`, `other`) has one seed, which stands for all."""
    if one or other:
        first, second = sorted(mine), sorted(theirs)
        return [(first[0] if one else seed, second[0] if other else seed) for seed in (second if one else first)]
    return [(seed, seed) for seed in sorted(set(mine) & set(theirs))]


def _contrast(
    mine: Counts, theirs: Counts, seeds: Sequence[tuple[int, int]], parts: Mapping[str, Sequence[str]]
) -> dict[str, Difference]:
    """BLEU by parts, over sentences and pairs of seeds."""
    boot = Bootstrap({domain: len(rows) for domain, rows in mine[seeds[0][0]].items()}, len(seeds))
    first, second = (dict.fromkeys(of) for of in zip(*seeds, strict=True))
    a, b = boot.scores([mine[seed] for seed in first]), boot.scores([theirs[seed] for seed in second])
    return {part: boot.difference(a, b, domains) for part, domains in parts.items()}


def _losses(one: Any, other: Any, seeds: Sequence[int]) -> dict[str, Any]:
    """The difference of the dev losses over the seeds; nothing where a row has none. A single seed has no interval."""
    losses = [[of["seeds"].get(str(seed), {}).get("dev_loss") for seed in seeds] for of in (one, other)]
    if None in losses[0] + losses[1]:
        return {}
    found = asdict(paired(*(torch.tensor(of, dtype=torch.float64) for of in losses)))
    return {"dev_loss": {name: value if math.isfinite(value) else None for name, value in found.items()}}
