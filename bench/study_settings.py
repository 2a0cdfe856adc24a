"""A study's rows as the settings of runs: what does not fit is refused before the first row runs, and a run that was
made with other settings is not counted.

    configs = settings(study)              # by row; one line for a recipe or a flag that is not there
    ready(study)                           # the same, and against the model and the parts: before anything runs
    stale(study, job, row, folder)         # how a finished run differs from its row; "" where it does not
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study_plan import Job, Row, start, words

from slicetune.engine.common.errors import UserError
from slicetune.engine.common.settings import as_dict, differences, of_stage, table
from slicetune.engine.run.cli import parse
from slicetune.engine.run.compare import Entry, check_all, load_recipe
from slicetune.engine.run.config import RunConfig, read_run

if TYPE_CHECKING:
    from study import Study


def settings(study: Study) -> dict[str, RunConfig]:
    """Of each row of the jobs, by its label. Raises UserError as `of_row` does."""
    return {row.label: of_row(study, job, row) for job in study.plan.jobs for row in job.rows}


def of_row(study: Study, job: Job, row: Row) -> RunConfig:
    """A row's settings. Raises UserError, naming the row, for a recipe, a flag or a value that does not exist."""
    where = f"study {study.plan.name}, job {job.name}, row {row.label}"
    try:
        return parse(load_recipe(Path(row.recipe)), [*study.first, *words(row.flags), *study.last])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(f"{where}: the box above names the flag that is wrong: mend it in the plan") from None


def ready(study: Study) -> None:
    """Raises UserError for whatever a row would stop at, hours later."""
    plan, found = study.plan, study.configs
    for job in [*([plan.rates] if plan.rates else []), *plan.jobs]:
        of = {row.label: of_row(study, job, row) for row in job.rows}
        check_all([Entry(f"study {plan.name}, job {job.name}, row {label}", c, c) for label, c in of.items()])
        _starts(study, job)
    tests = {label: _tests(config) for label, config in found.items()}
    first = next(iter(tests))
    if other := next((label for label, of in tests.items() if of != tests[first]), ""):
        rows = f"rows {first} and {other} are tested on different sentences"
        raise UserError(f"study {plan.name}: {rows}: {table(differences(tests[first], tests[other]))}: set one for all")
    if (smooth := found[first].evaluate.smooth) != "exp":
        raise UserError(f"--evaluate.smooth {smooth}: a study's intervals are those of exp: leave it out")
    domains = _domains(found[first])
    for name, of in plan.parts.items():
        if missing := [domain for domain in of if domain not in domains]:
            why = f"no run is tested on {' '.join(missing)}: name some of {' '.join(domains)}"
            raise UserError(f"{plan.path}: part {name}: {why}")


def _domains(config: RunConfig) -> list[str]:
    """What a part can name: a domain, or a domain of one direction."""
    data = config.data
    return [*data.domains, *(f"{pair}/{domain}" for pair in data.pairs for domain in data.domains)]


def _starts(study: Study, job: Job) -> None:
    """Raises UserError for a row of a job after another that would start from no model, or lose what it follows."""
    for row in job.rows if job.after else ():
        before, where = start(job, row), f"study {study.plan.name}, job {job.name}, row {row.label}"
        method = study.configs[before].method
        if not (method.trains and method.merges):
            raise UserError(f"{where}: {method.title} of row {before} leaves no model to start from: leave the row out")
        if (own := study.configs[row.label].method).follows and not own.match:
            remedy = "set --method.match to its neurons.safetensors"
            raise UserError(
                f"{where}: {own.title} takes its size from a CANEFT in its job; here rows run alone: {remedy}"
            )


def stale(study: Study, job: Job, row: Row, folder: Path) -> str:
    """In what a finished run's settings differ from its row's, as `name: that run's → the row's`; "" if in nothing."""
    try:
        ran = read_run(folder)
    except UserError as error:
        return str(error)
    want, rate = study.configs[row.label], study.rate(row)
    loose = {"sweep"} | ({"learning_rate"} if want.train.sweep or (row.rate and rate is None) else set())
    loose |= set() if want.method.routed else {"micro_batch_size"}  # which sentences a routed update reads
    if rate is not None:
        want = replace(want, train=replace(want.train, learning_rate=rate))
    return table(differences(_decisive(ran, job, loose), _decisive(want, job, loose)))


def _decisive(config: RunConfig, job: Job, loose: Collection[str]) -> dict[str, Any]:
    """What decides a run's results, without those settings of the training that are `loose`."""
    data, method, evaluate = config.data, config.method, config.evaluate
    found = {"seen": data.seen, "max_length": data.max_length, "prompt": data.prompt, **_tests(config)}
    found |= {"method": {k: v for k, v in as_dict(method).items() if k != "match"}, "quantize": config.model.quantize}
    found |= {"dtype": config.model.dtype, "evaluate": of_stage(evaluate, "decode"), "smooth": evaluate.smooth}
    if not job.after:
        found["model"] = Path(config.model.path).name
    if method.scores:
        found |= {"score": of_stage(config.score, "score"), "score_sentences": data.score_sentences}
    if method.trains:
        train = of_stage(config.train, "train")
        found["train"] = {name: value for name, value in train.items() if name not in loose}
        found |= {"train_sentences": config.train_sentences, "train_pairs": data.train_pairs}
        found |= {"dev_sentences": data.dev_sentences}
    return found


def _tests(config: RunConfig) -> dict[str, Any]:
    """What decides which sentences a run is tested on."""
    data = config.data
    pairs = {"pairs": data.pairs} if data.pairs else {"pair": data.pair}
    which = {"test_sentences": data.test_sentences, "test_split": data.test_split, "test_dir": data.test_dir}
    return pairs | {"domains": sorted(data.domains)} | which
