"""The stages of a run that measure: translate what is compared, score the translations, write the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..common import distributed, signals
from ..common.files import write_atomically
from ..data import prompts, records
from ..data.records import Pair
from ..evaluation import comet, results
from ..evaluation.comet import Unavailable, identity, job, model_name, python, run
from ..evaluation.report.run import write_report
from ..evaluation.translation import Translated, gather, translate
from ..export import attached as bottleneck
from ..export.routed import load_routed
from ..methods.few_shot import FewShot, fit
from ..models import load as models
from .config import RunConfig
from .stages import Stages

if TYPE_CHECKING:
    from .job import Run


def translate_base(run: Run) -> None:
    """Leave translations/base."""
    _translate(run, lambda: run.model(run.base), "base", run.base)


def translate_trained(run: Run) -> None:
    """Leave the translations of what the method makes of the base."""
    few_shot = isinstance(run.config.method, FewShot)
    _translate(run, lambda: _load_trained(run), run.name, run.base if few_shot else run.trained)


def _load_trained(run: Run) -> nn.Module:
    """The model that the method gives, ready to decode."""
    if isinstance(run.config.method, FewShot):
        return run.model(run.base)
    if run.config.method.routed:
        return load_routed(run.trained, run.config.model, run.device)
    if run.config.method.merges:
        return run.model(run.trained)
    return bottleneck.load(run.trained, str(run.base), run.config.model, run.device)


def _translate(run: Run, load: Callable[[], nn.Module], system: str, folder: Path) -> None:
    """Translate every test set that is not yet; `load` gives the model, whose files are in `folder`."""
    evaluate, prompt = run.config.evaluate, prompts.resolve(run.config.data, run.config.seed)
    shots = _shots(run, prompt) if system == "few_shot" else {}
    identity = {"settings": run.stages.settings, "model": models.fingerprint(folder)}
    finished, model = Translated(run.out / "translations" / system, identity), None
    for name, pairs in run.tests().items():
        path = results.translations(run.out, system, name, pairs[0].languages[1])
        file = str(path.relative_to(finished.folder))
        if finished.has(file):
            distributed.print0(f"{system}: {name}: translated before")
            continue
        model = model or load()
        mine = translate(
            model,
            run.tokenizer,
            prompt,
            pairs,
            evaluate.batch_size,
            evaluate.max_new_tokens,
            distributed.rank(),
            distributed.world(),
            lambda done, batches: signals.boundary(f"decoding {name}"),  # noqa: B023  (called before the next domain)
            shots=shots.get(name),
        )
        lines = gather(mine)
        if distributed.rank() == 0:
            finished.write(file, lines)
        distributed.print0(f"{system}: {name}: {len(pairs)} sentences translated")


def _shots(run: Run, prompt: prompts.Prompt) -> dict[str, list[list[records.Pair]]]:
    """The examples of each test sentence, by the name of its domain; how many did not fit is printed."""
    tests, limit, found = run.tests(), run.config.data.max_length, {}
    for data in run.directions:
        for domain in data.domains:
            name = data.name(domain)
            drawn = run.config.method.examples(data, domain, tests[name], run.config.seed)
            found[name], short = fit(run.tokenizer, prompt, tests[name], drawn, limit)
            if short:
                what = f"{short} of {len(drawn)} prompts have fewer examples than --method.shots"
                distributed.print0(f"{name}: {what}, to keep to --data.max-length {limit}")
    return found


def evaluate(run: Run, comet_said: dict[str, Any]) -> dict[str, Any]:
    """Leave results.json and report.html; returns the former's content. The first rank alone calls it."""
    tests = run.tests()
    results.write_sides(run.out, tests)
    found = results.scores(run.out, run.directions, run.systems, tests, run.config.evaluate.smooth)
    found |= results.training(run.out)
    comet.add(found, comet_said, run.out)
    found |= {"method": run.name, "model": run.config.model.path}
    found |= {"train_sentences": run.config.train_sentences} if run.config.method.trains else {}
    found |= {"seconds": run.stages.seconds(), "ranks": distributed.world()}
    write_atomically(run.out / "results.json", json.dumps(found, indent=1))
    found["report"] = str(write_report(run.out))
    return found


def stage(
    config: RunConfig, systems: Sequence[str], stages: Stages, tests: Callable[[], Mapping[str, Sequence[Pair]]]
) -> dict[str, Any]:
    """The stage of a run, on every rank: scores in comet.json, if they are asked for and can be had.

    `tests` gives the sentences that were decoded, by the name of their domain. Returns what results.json is to say:
    nothing, whose scores they are, or why there are none.
    """
    model, out = model_name(config.evaluate.comet), Path(config.out)
    if not model:
        return {}

    def prepare() -> tuple[Path, dict[str, Any], dict[str, Any]] | str:
        try:
            interpreter = python(config.evaluate.comet_python)
        except Unavailable as error:
            return str(error)
        pairs = tests()
        results.write_sides(out, pairs)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the program takes the same GPU
        languages = {name: of[0].languages for name, of in pairs.items()}
        work = job(out, model, languages, systems, config.evaluate.batch_size)
        return interpreter, work, identity(work)

    ready = distributed.share_object(distributed.first(prepare))
    try:
        if isinstance(ready, str):
            raise Unavailable(ready)
        interpreter, work, depends_on = ready
        mine = interpreter if distributed.rank() == 0 else None
        stages.aside("comet", depends_on, out / "comet.json", lambda: run(work, mine))
    except Unavailable as error:
        distributed.print0(f"COMET {model} is not computed: {error}")
        return {"comet": {"model": model, "missing": str(error)}}
    return {"comet": {"model": model}}
