"""The stages of a run that measure: translate what is compared, score the translations, write the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common import distributed, signals
from ..common.checkpoint import MASTER
from ..common.errors import UserError
from ..common.files import read_json, write_json
from ..common.output import Bar
from ..data import prompts
from ..data.records import Pair
from ..evaluation import comet, results
from ..evaluation.report.run import write_report
from ..evaluation.translation import Line, Translated, gather
from ..evaluation.translation import translate as decode
from ..export import attached
from ..export.live import CHOSEN, chosen_masters
from ..export.routed import load_routed
from ..methods.few_shot import fit
from ..models import load
from ..models.large.parallel import shares
from ..models.large.partition import is_partitioned
from ..slices.patches import load_masters
from .config import RunConfig
from .job import Job
from .stages import Stages

Shots = Mapping[str, list[list[Pair]]]
"""Examples for each test sentence's prompt, by the name of its domain."""


def load_trained(job: Job, folder: Path) -> nn.Module:
    """The model that the method gives, ready to decode; `folder` is where it lies."""
    method, full = job.config.method, job.settings(folder)
    quantised = job.config.measured_on != "full"
    if method.trains and not method.merges:
        model = job.config.model if quantised else full
        return attached.load(folder, str(job.base), model, job.device, job.held)
    if method.trains and quantised:
        return _on_quantised(job)
    if method.routed:
        return load_routed(folder, full, job.device, job.held)
    return job.decoder(folder if method.trains else None)


def _on_quantised(job: Job) -> nn.Module:
    """What was trained, as it was trained: the chosen checkpoint's values beside the quantised base.

    Raises UserError where that checkpoint has been deleted.
    """
    folder = job.out / read_json(job.out / CHOSEN)["checkpoint"]
    if not folder.is_dir():
        gone = f"{folder} is gone: it has what was trained on the base in {job.config.model.quantize}"
        raise UserError(f"{gone}; --evaluate.on full decodes the export, which needs no checkpoint")
    method, model = job.config.method, job.model()
    chosen = method.load_chosen(job.out)
    method.prepare(model, chosen, groups=chosen.pairs if method.routed else ())
    load_masters(model, {n: t for n, t in chosen_masters(job.out).items() if n.startswith(MASTER)})
    return model.requires_grad_(False).eval()


WEIGHTS = "weights.txt"
"""In a run's translations/, where its base is quantised: the weights that they were decoded with."""


def bring_translations(folder: Path, on: str) -> None:
    """Let `folder` hold the translations by the weights `on`; those by others are kept beside, as `<folder>-<others>`.

    The first rank alone calls it. A run that was never quantised has no others.
    """
    mark = folder / WEIGHTS
    made_with = mark.read_text().strip() if mark.is_file() else "full"
    if folder.exists() and made_with != on:
        folder.rename(folder.with_name(f"{folder.name}-{made_with}"))
    kept = folder.with_name(f"{folder.name}-{on}")
    if not folder.exists() and kept.exists():
        kept.rename(folder)
    if on != "full":
        folder.mkdir(exist_ok=True)
        mark.write_text(f"{on}\n")


def translate(
    job: Job, system: str, model_of: Callable[[], nn.Module], folder: Path, settings: Any, shots: Shots | None = None
) -> None:
    """Leave `translations/<system>`: every test set that is not there yet.

    `model_of` gives the model, whose files are in `folder`; `settings` are those of all stages up to here.
    """
    identity = {"settings": settings, "model": load.fingerprint(folder)}
    finished, model = Translated(job.out / "translations" / system, identity), None
    for name, pairs in job.tests().items():
        path = results.translations(job.out, system, name, pairs[0].languages[1])
        file = str(path.relative_to(finished.folder))
        if finished.has(file):
            distributed.print0(f"{system}: {name}: translated before")
            continue
        model = model or _told(system, model_of())
        mine = _decode(job, model, f"{system}: {name}", pairs, (shots or {}).get(name))
        lines = gather(mine)
        if distributed.rank() == 0:
            finished.write(file, lines)
        if cut := sum(line.cut for line in lines):
            limit = job.config.evaluate.max_new_tokens
            distributed.print0(
                f"{system}: {name}: {cut} of {len(lines)} sentences cut at --evaluate.max-new-tokens {limit}"
            )


def _told(system: str, model: nn.Module) -> nn.Module:
    """The model, after a line on how it decodes if ranks share it."""
    if is_partitioned(model):
        distributed.print0(f"{system}: cannot be cut by tensors: every token gathers all weights, which is slow")
    elif (groups := shares(model)[1]) < distributed.world():
        together = distributed.world() // groups
        distributed.print0(f"{system}: decoded by tensor parallelism, {together} ranks together")
    return model


def _decode(
    job: Job, model: nn.Module, what: str, pairs: Sequence[Pair], shots: list[list[Pair]] | None
) -> list[Line | None]:
    """This rank's share of the translations of `pairs`, with a bar for all ranks'."""
    evaluate, prompt = job.config.evaluate, prompts.resolve(job.config.data, job.config.seed)
    (rank, world), size = shares(model), evaluate.batch_size
    with Bar(what, len(pairs), "sentence") as bar:

        def after_batch(done: int, batches: int) -> None:
            bar.add(size * world)
            signals.boundary(f"decoding {what}")

        limit = evaluate.max_new_tokens
        return decode(model, job.tokenizer, prompt, pairs, size, limit, rank, world, after_batch, shots=shots)


def shots(job: Job) -> Shots:
    """The examples that the method puts before each test sentence; how many did not fit is printed."""
    config, tests, found = job.config, job.tests(), {}
    prompt, limit = prompts.resolve(config.data, config.seed), config.data.max_length
    for data in job.directions:
        for name, domain in ((data.name(domain), domain) for domain in data.domains):
            drawn = config.method.examples(data, domain, tests[name], config.seed)
            if drawn is None:
                continue
            found[name], short = fit(job.tokenizer, prompt, tests[name], drawn, limit)
            if short:
                what = f"{short} of {len(drawn)} prompts have fewer examples than --method.shots"
                distributed.print0(f"{name}: {what}, to keep to --data.max-length {limit}")
    return found


def write_results(
    out: Path, found: dict[str, Any], comet_said: dict[str, Any], about: dict[str, Any]
) -> dict[str, Any]:
    """Leave results.json and report.html; returns the former's content. The first rank alone calls it."""
    comet.add(found, comet_said, out)
    found |= about
    write_json(out / "results.json", found)
    found["report"] = str(write_report(out))
    return found


def comet_stage(
    config: RunConfig, systems: Sequence[str], stages: Stages, tests: Callable[[], Mapping[str, Sequence[Pair]]]
) -> dict[str, Any]:
    """The stage of a run, on every rank: scores in comet.json, if they are asked for and can be had.

    `tests` gives the sentences that were decoded, by the name of their domain. Returns what results.json is to say:
    nothing, whose scores they are, or why there are none.
    """
    model, out = comet.model_name(config.evaluate.comet), Path(config.out)
    if not model:
        return {}

    def prepare() -> tuple[Path, dict[str, Any], dict[str, Any]] | str:
        try:
            interpreter = comet.python(config.evaluate.comet_python)
        except comet.Unavailable as error:
            return str(error)
        pairs = tests()
        results.write_sides(out, pairs)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the program takes the same GPU
        languages = {name: of[0].languages for name, of in pairs.items()}
        work = comet.job(out, model, languages, systems, config.evaluate.batch_size)
        return interpreter, work, comet.identity(work)

    ready = distributed.share_object(distributed.first(prepare))
    try:
        if isinstance(ready, str):
            raise comet.Unavailable(ready)
        interpreter, work, depends_on = ready
        mine = interpreter if distributed.rank() == 0 else None
        stages.aside("comet", depends_on, out / "comet.json", lambda: comet.run(work, mine))
    except comet.Unavailable as error:
        distributed.print0(f"COMET {model} is not computed: {error}")
        return {"comet": {"model": model, "missing": str(error)}}
    return {"comet": {"model": model}}
