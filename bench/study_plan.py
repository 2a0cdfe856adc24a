"""A study as it is written down: bench/studies/NAME.toml.

    title, about    what is asked, and why these numbers
    seeds           every row is run with each; a row without training, with the first
    contrasts       pairs of rows whose difference is tested
    [parts]         domains whose mean BLEU is a column, by the column's name
    [flags]         of every run, as a recipe's command line has them: "train.max-steps" = 300
    [rates.flags], [rates.rows]                 one sweep with the first seed, from which rows take their learning rate
    [jobs.NAME.flags], [jobs.NAME.rows]         a comparison; `after = "NAME"` starts each row from that job's model
    row = { recipe = "caneft_tiny", rate = "caneft", "method.neuron-ratio" = 0.1 }

A row's flags come after the job's, and those after the study's: the last one counts.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from study_toml import sound

from slicetune.engine.common.errors import UserError

FOLDER = Path(__file__).parent / "studies"


@dataclass(frozen=True)
class Row:
    """One method with its settings."""

    label: str
    recipe: str
    flags: Mapping[str, Any]
    rate: str = ""
    """The row of the sweep whose learning rate it takes."""


@dataclass(frozen=True)
class Job:
    """One comparison."""

    name: str
    rows: tuple[Row, ...]
    after: str = ""
    """The job whose trained models its rows start from, each from its own."""


@dataclass(frozen=True)
class Plan:
    name: str
    title: str
    about: str
    seeds: tuple[int, ...]
    jobs: tuple[Job, ...]
    rates: Job | None = None
    contrasts: tuple[tuple[str, str], ...] = ()
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    path: Path = Path()
    """Its file."""

    @property
    def rows(self) -> list[Row]:
        """Of all jobs, in the table's order."""
        return [row for job in self.jobs for row in job.rows]


def read(name: str) -> Plan:
    """The plan of that name, or the file. Raises UserError where it is none, or names a row that it has not."""
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if name.endswith(".toml") and not path.is_file():
        raise UserError(f"{name}: no such file")
    if not path.is_file():
        there = " ".join(sorted(file.stem for file in FOLDER.glob("*.toml")))
        raise UserError(f"{name}: no such study: name one of {there}, or a file of your own that ends in .toml")
    if path.parent.resolve() != FOLDER and (FOLDER / path.name).is_file():
        raise UserError(f"{name}: {path.stem} is a study of bench/studies, whose page this would overwrite: rename it")
    try:
        written = tomllib.loads(path.read_text(encoding="utf-8"))
        sound(written)
    except (UserError, ValueError, OSError) as error:  # a TOMLDecodeError and a UnicodeDecodeError are ValueErrors
        raise UserError(f"{path}: not a study: {error}; bench/study_plan.py says what one has") from None
    return check(_plan(path, written), path)


def _plan(path: Path, written: Mapping[str, Any]) -> Plan:
    common = written.get("flags", {})
    return Plan(
        path.stem,
        written["title"],
        " ".join(written["about"].split()),
        tuple(written["seeds"]),
        tuple(_job(job, of, common) for job, of in written["jobs"].items()),
        _job("rates", written["rates"], common) if "rates" in written else None,
        tuple((one, other) for one, other in written.get("contrasts", ())),
        {part: tuple(domains) for part, domains in written["parts"].items()},
        path,
    )


def _job(name: str, written: Mapping[str, Any], common: Mapping[str, Any]) -> Job:
    flags = {**common, **written.get("flags", {})}
    return Job(name, tuple(_row(label, row, flags) for label, row in written["rows"].items()), written.get("after", ""))


def _row(label: str, written: Mapping[str, Any], flags: Mapping[str, Any]) -> Row:
    own = {key: value for key, value in written.items() if key not in ("recipe", "rate")}
    return Row(label, written["recipe"], {**flags, **own}, written.get("rate", ""))


def check(plan: Plan, path: Path) -> Plan:
    """The plan. Raises UserError for labels that no row has, or two rows have."""
    labels = [row.label for row in plan.rows]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise UserError(f"{path}: two rows are called {' '.join(sorted(twice))}: give each a name of its own")
    if unknown := {label for pair in plan.contrasts for label in pair} - set(labels):
        raise UserError(f"{path}: contrasts name {' '.join(sorted(unknown))}, which is no row")
    swept = {row.label for row in plan.rates.rows} if plan.rates else set()
    if unknown := {row.rate for row in plan.rows if row.rate} - swept:
        raise UserError(f"{path}: rate names {' '.join(sorted(unknown))}, which [rates.rows] has not")
    names = [job.name for job in plan.jobs]
    for place, job in enumerate(plan.jobs):
        if job.after and job.after not in names[:place]:
            raise UserError(f"{path}: job {job.name} comes after {job.after}, which is no job before it")
        before = next((each for each in plan.jobs if each.name == job.after), None)
        if before and (missing := [own for own in _starts(job) if own not in {r.label for r in before.rows}]):
            raise UserError(f"{path}: {' '.join(missing)} of job {job.name}: job {job.after} has no such row")
    return plan


def _starts(job: Job) -> list[str]:
    return [start(job, row) for row in job.rows]


def start(job: Job, row: Row) -> str:
    """The row of the job before from which this one starts: its own label without `_<job>`."""
    return row.label.removesuffix(f"_{job.name}")


def words(flags: Mapping[str, Any]) -> list[str]:
    """Flags as a command line has them: a list's values follow its flag, and a flag that is false gets `no-`."""
    found = []
    for name, value in flags.items():
        if isinstance(value, bool):
            head, _, last = name.rpartition(".")
            found.append(f"--{name}" if value else f"--{head}.no-{last}" if head else f"--no-{last}")
        else:
            found += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return found
