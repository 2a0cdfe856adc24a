"""A study: written comparisons of methods on real text, run one after the other, with the page that says what is known.

    python bench/study.py capacity MODEL DATA
    python bench/study.py routing MODEL DATA --data.prompt "Translate from {src} into {tgt}."
    python bench/study.py capacity MODEL DATA --page-only        # of what is finished so far

NAME is a plan of bench/studies/, or a file of your own (study_plan.py says what one has). MODEL and DATA are what
--model.path and --data.dir take. Flags that are not listed by --help go to every run, after the plan's own. Given
again, the study goes on where it stopped. Of each job all runs of the first seed come before those of the second. It
runs at the lowest priority.

Before anything runs, every row is checked against the model (study_settings.py).

Next: study_numbers.py compares what was measured, study_page.py writes bench/results/study-NAME.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from about import ROOT, provenance
from study_numbers import collect
from study_page import page
from study_plan import FOLDER, Job, Plan, Row, read, start, words
from study_plots import draw
from study_settings import ready, settings

from slicetune.engine.common.command import one_line
from slicetune.engine.common.errors import UserError
from slicetune.engine.common.files import read_json, write_text
from slicetune.engine.models import load
from slicetune.engine.run.config import RunConfig

RECIPE = '''"""A row of a study: {recipe} with the study's flags."""

from pathlib import Path

from slicetune.engine.run.cli import parse
from slicetune.engine.run.compare import load_recipe

CONFIG = parse(load_recipe(Path({recipe!r})), {words!r})
'''


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """This program's own, and those that go to every run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("--out", type=Path, help="where the runs lie; runs/study-NAME-<model's name>")
    parser.add_argument("--ranks", type=int, default=max(1, torch.cuda.device_count()), help="one a GPU, or one")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of the page")
    parser.add_argument("--page-only", action="store_true", help="run nothing")
    return parser.parse_known_args()


def main() -> None:
    given, rest = arguments()
    with one_line():
        plan, model = read(given.name), Path(given.model).name or Path(given.model).resolve().name
        out = given.out or Path("runs") / f"study-{plan.name}-{model}"
        study = Study(plan, out, ["--model.path", given.model, "--data.dir", given.data], rest, given.ranks)
        if given.page_only:
            if not publish(study, model, given.results):
                raise UserError(
                    f"{out}: no run of study {plan.name} is finished with these flags: leave out --page-only"
                )
            return
        for folder, flag in ((given.results, "--results"), (out, "--out")):
            writable(folder, flag)
        ready(study)
        of_others(given.results / f"study-{plan.name}.json", model, load.fingerprint(load.snapshot(given.model)))
        os.nice(19)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            study.run()
        finally:
            publish(study, model, given.results)


def writable(folder: Path, flag: str) -> None:
    """Make the folder. Raises UserError where nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be written to ({error.strerror}): name another folder") from None


class Study:
    """A plan on a model and a corpus, in a folder; `first` and `last` are flags before and after the plan's own."""

    def __init__(self, plan: Plan, out: Path, first: list[str], last: list[str], ranks: int) -> None:
        self.plan, self.out, self.first, self.last, self.ranks = plan, out, first, last, ranks

    def run(self) -> None:
        """What is not done yet."""
        if self.plan.rates:
            self.compare(self.plan.rates, self.plan.seeds[:1])
        for job in self.plan.jobs:
            for count in range(1, len(self.plan.seeds) + 1):
                self.run_job(job, self.plan.seeds[:count])

    def run_job(self, job: Job, seeds: Sequence[int]) -> None:
        """One comparison; or, where every row starts from a model of its own, one a row for the newest seed."""
        if not job.after:
            return self.compare(job, seeds)
        for row in job.rows:
            model = self.folder(job.after, start(job, row), seeds[-1]) / "model"
            self.compare(Job(job.name, (row,)), seeds[-1:], ["--model.path", str(model)])

    def compare(self, job: Job, seeds: Sequence[int], more: Sequence[str] = ()) -> None:
        """Run `slicetune compare` in processes of its own. Exits with its code where it fails."""
        recipes = [str(self.recipe(job, row)) for row in job.rows]
        launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(self.ranks)] if self.ranks > 1 else []
        command = [sys.executable, *launch, "-m", "slicetune.engine", "compare", *recipes]
        command += ["--out", str(self.out / job.name), "--seeds", *map(str, seeds), *more]
        print(f"\n=== {self.plan.name}: {job.name}, seeds {' '.join(map(str, seeds))}", flush=True)
        if code := wait(subprocess.Popen(command)):
            print(
                f"job {job.name} has stopped for the reason above; the same command goes on from there", file=sys.stderr
            )
            sys.exit(code)

    def recipe(self, job: Job, row: Row) -> Path:
        """The row as a recipe file, which `compare` takes."""
        path = self.out / "recipes" / job.name / f"{row.label}.py"
        flags = dict(row.flags)
        if row.rate:
            if (rate := self.rate(row)) is None:
                raise UserError(f"row {row.label}: the sweep of {row.rate} has not finished in {self.out / 'rates'}")
            flags["train.learning-rate"] = rate
        text = RECIPE.format(recipe=row.recipe, words=[*self.first, *words(flags), *self.last])
        write_text(path, text)
        return path

    def rate(self, row: Row) -> float | None:
        """The learning rate that the sweep has found for the row; None where it takes none, or there is none yet."""
        found = self.folder("rates", row.rate, self.plan.seeds[0]) / "results.json"
        return read_json(found)["learning_rate"] if row.rate and found.is_file() else None

    @functools.cached_property
    def configs(self) -> dict[str, RunConfig]:
        """Each row's settings, by its label."""
        return settings(self)

    def folder(self, job: str, label: str, seed: int) -> Path:
        """Where a run lies, as compare lays it."""
        return self.out / job / label / f"seed-{seed}"


def wait(process: subprocess.Popen[bytes]) -> int:
    """Its exit code. Who stops the study stops the comparison too, which saves where it is."""
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def publish(study: Study, model: str, results: Path) -> bool:
    """Write what is finished into study-NAME.json and its page; other models' measurements in it stay.

    False, and nothing is written, where nothing is finished. Raises UserError as `of_others` does.
    """
    plan, found = study.plan, collect(study)
    if not found["rows"]:
        return False
    path = results / f"study-{plan.name}.json"
    models = of_others(path, model, found["fingerprint"])
    name = plan.name if plan.path.parent.resolve() == FOLDER else plan.path.name
    command = shlex.join(["python", "bench/study.py", name, "MODEL", "DATA", *study.last])
    models[model] = {"provenance": provenance(), "command": command, **found}
    write_text(path, json.dumps(models, indent=1, allow_nan=False) + "\n")
    plots = {name: draw(plan, name, of, results) for name, of in models.items()}
    write_text(path.with_suffix(".md"), page(plan, models, plots))
    print(f"\n{path.with_suffix('.md')}", flush=True)
    return True


def of_others(path: Path, model: str, fingerprint: str) -> dict[str, Any]:
    """What study-NAME.json holds. Raises UserError where that is another model that is called the same."""
    models = read_json(path) if path.is_file() else {}
    if models.get(model, {}).get("fingerprint", fingerprint) != fingerprint:
        remedy = "call this one's folder otherwise, name another --results, or take the old numbers out of the file"
        raise UserError(f"{path}: has numbers of another model that is called {model}: {remedy}")
    return models


if __name__ == "__main__":
    main()
