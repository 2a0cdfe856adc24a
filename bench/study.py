"""A study: written comparisons of methods on real text, run one after the other, with the page that says what is known.

    python bench/study.py capacity MODEL DATA
    python bench/study.py routing MODEL DATA --data.prompt "Translate from {src} into {tgt}."
    python bench/study.py capacity MODEL DATA --page-only        # of what is finished so far

NAME is a plan of bench/studies/, or a file of your own (study_plan.py says what one has). MODEL and DATA are what
--model.path and --data.dir take. Flags that are not listed by --help go to every run, after the plan's own. Given
again, the study goes on where it stopped. Of each job all runs of the first seed come before those of the second. It
runs at the lowest priority.

Next: study_numbers.py compares what was measured, study_page.py writes bench/results/study-NAME.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from about import ROOT, provenance
from study_numbers import collect
from study_page import page
from study_plan import Job, Plan, Row, read, start, words
from study_plots import draw

from slicetune.engine.common.command import one_line

RECIPE = '''"""A row of a study: {recipe} with the study's flags."""

from pathlib import Path

from slicetune.engine.run.cli import parse
from slicetune.engine.run.compare import load_recipe

CONFIG = parse(load_recipe(Path({recipe!r})), {words!r})
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--out", type=Path, help="where the runs lie; runs/study-NAME-<model's name>")
    parser.add_argument("--ranks", type=int, default=max(1, torch.cuda.device_count()), help="one a GPU, or one")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of the page")
    parser.add_argument("--page-only", action="store_true", help="run nothing")
    given, rest = parser.parse_known_args()
    with one_line():
        plan, model = read(given.name), Path(given.model).name
        out = given.out or Path("runs") / f"study-{plan.name}-{model}"
        study = Study(plan, out, ["--model.path", given.model, "--data.dir", given.data], rest, given.ranks)
        if not given.page_only:
            os.nice(19)
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            if not given.page_only:
                study.run()
        finally:
            publish(study, model, given.results)


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
            sys.exit(code)

    def recipe(self, job: Job, row: Row) -> Path:
        """The row as a recipe file, which `compare` takes."""
        path = self.out / "recipes" / job.name / f"{row.label}.py"
        flags = dict(row.flags)
        if row.rate:
            flags["train.learning-rate"] = self.rate(row)
        text = RECIPE.format(recipe=row.recipe, words=[*self.first, *words(flags), *self.last])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def rate(self, row: Row) -> float:
        """The learning rate that the sweep has found for the row."""
        found = self.folder("rates", row.rate, self.plan.seeds[0]) / "results.json"
        return json.loads(found.read_text())["learning_rate"]

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


def publish(study: Study, model: str, results: Path) -> None:
    """Write what is finished into study-NAME.json and its page; other models' measurements in it stay."""
    plan, found = study.plan, collect(study)
    if not found["rows"]:
        return
    path = results / f"study-{plan.name}.json"
    models = json.loads(path.read_text()) if path.is_file() else {}
    command = shlex.join(["python", "bench/study.py", plan.name, "MODEL", "DATA", *study.last])
    models[model] = {"provenance": provenance(), "command": command, **found}
    results.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(models, indent=1) + "\n", encoding="utf-8")
    plots = {name: draw(plan, name, of, results) for name, of in models.items()}
    path.with_suffix(".md").write_text(page(plan, models, plots), encoding="utf-8")
    print(f"\n{path.with_suffix('.md')}", flush=True)


if __name__ == "__main__":
    main()
