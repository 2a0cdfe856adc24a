"""The main job: text → scores → neurons → trained slices → model → translations → results, stage by stage.

Each stage leaves an artefact under `--out` and is skipped when that is there and was made with the same settings
(stages.py). All ranks walk through the same stages; what only one can do, the first one does. What a stage does is in
choose.py, train.py and measure.py; they are given the run's inputs (job.py), which none of them changes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..common import __version__, distributed
from ..common.errors import UserError
from ..common.files import write_json
from ..common.settings import kept, of_stage
from ..data.tokenizer import tokens
from ..evaluation import results
from ..evaluation.report.run import table
from ..methods.counts import Trainable
from ..models import load
from ..models.shapes import ModelShape
from . import choose, measure, status, train
from .config import RunConfig
from .forecast.useless import useless
from .job import Job
from .prompted import known, warned
from .stages import Lock, Stages, named


def run(config: RunConfig) -> dict[str, Any]:
    """Run every stage that is not done; returns the content of results.json. Raises UserError for bad input."""
    distributed.start()
    found = run_one(config)
    distributed.stop()  # after an error command.one_line does, once it has said what is wrong
    return found


def run_one(config: RunConfig, walk: Callable[[Run], Any] | None = None) -> Any:
    """`run` among ranks that are up already and stay so: one of several runs in the same processes (compare.py).

    `walk` says how far: Run.to_chosen, Run.to_model, or (the default) Run.to_results; returns what that returns.
    """
    lock = Lock(Path(config.out))
    with lock, status.recorded(lock.out):
        torch.manual_seed(config.seed)
        if config.deterministic:
            be_deterministic()
        job = Job(config)
        with _useless_remedies(job):
            return (walk or Run.to_results)(Run(job))


@contextlib.contextmanager
def _useless_remedies(job: Job) -> Iterator[None]:
    """An error within knows what of each stage's remedies against too little memory would not help (errors.py)."""
    try:
        yield
    except Exception as error:
        stages = {"score": job.scoring, "train": job.training, "translate": job.training}
        error.useless = {name: useless(config, distributed.world()) for name, config in stages.items()}
        raise


def check(config: RunConfig, shape: ModelShape, like: Trainable | None = None) -> None:
    """Raises UserError for settings that do not suit each other or the model: before anything is scored or trained.

    `like` is what the set has at least that a comparison will give a method that follows (Method.check).
    """
    method = config.method
    config.check_groups()
    if config.model.recompute_ffn and not method.trains_slices:
        remedy = "use --model.activation-checkpointing on"
        raise UserError(f"--model.recompute-ffn: {method.title} trains no slices; {remedy}")
    if config.model.quantize in ("nf4", "int8") and not importlib.util.find_spec("bitsandbytes"):
        raise UserError(f"--model.quantize {config.model.quantize}: pip install 'slicetune[quantize]' (bitsandbytes)")
    method.check(shape, len(config.data.groups), like)
    if config.export.adapter != "none" and method.trains_biases(shape):
        what = f"{shape.name} has biases in its FFNs, which are trained with the rows of a weight"
        raise UserError(f"--export.adapter {config.export.adapter}: {what}; a LoRA adapter has none: leave it at none")
    train.check(config)


class Run:
    """The walk through a run's stages; `settings` grow from stage to stage, as stages.json keeps them."""

    def __init__(self, job: Job) -> None:
        self.job, self.config, self.out = job, job.config, job.out
        self.stages = Stages(job.out)

    def to_results(self) -> dict[str, Any]:
        """Every stage; returns the content of results.json."""
        self.to_model()
        self._translate()
        if self.config.export.adapter != "none":
            self._adapter()
        job = self.job
        said = measure.comet_stage(self.config, job.systems, self.stages, job.tests)
        with named("evaluate"):
            found = distributed.share_object(distributed.first(lambda: self._evaluate(said)))
        distributed.print0(table(found))
        return found

    def to_model(self) -> None:
        """On from the chosen neurons to the exported model."""
        self.to_chosen()
        method = self.config.method
        if method.trains:
            self._train()
            trained = self.out / method.trained_folder
            self.stages.first("export", {"dtype": self.config.evaluate.dtype}, trained, self._export)
        if method.leaves_delta:
            self.stages.first("delta", {}, self.out / "delta", self._delta)

    def to_chosen(self) -> None:
        """From scores to the chosen neurons, as far as the method needs them."""
        c, job, method = self.config, self.job, self.config.method
        distributed.first(lambda: check(c, job.shape))
        for note in method.notes(job.shape):
            distributed.print0(note)
        if distributed.rank() == 0:
            write_json(self.out / "config.json", kept(c))
        other = "pair" if c.data.pairs else "pairs"
        data = {name: value for name, value in of_stage(c.data, "score").items() if name != other}
        source = {"model": load.fingerprint(job.base), "corpus": job.report.fingerprint}
        source |= {"quantize": c.model.quantize} if c.quantised else {}
        self.stages.settings |= source | {"data": data, "seed": c.seed}
        own = job.method_settings()
        if method.scores:
            scores = self.out / method.statistics_file
            self.stages.do("score", {"score": of_stage(c.score, "score")}, scores, self._score)
        if method.chosen_file:
            self.stages.first("select", own, self.out / method.chosen_file, self._select)

    # ---------------------------------------------------------------- the stages, with what each needs

    def _score(self) -> None:
        c, job, method = self.config, self.job, self.config.method
        if c.score.reuse:
            choose.take(self.stages, Path(c.score.reuse), self.out / method.statistics_file)
        elif method.routes:
            asked = job.examples("train", c.data.score_sentences)
            choose.detect_units(job, asked, self.stages.settings)
        else:
            examples = job.examples("train", c.data.score_sentences)
            choose.score_neurons(job, examples, self.stages.settings)

    def _select(self) -> None:
        choose.select(self.config.method, self.out, self.job.shape, self.config.seed, self.stages.settings)

    def _train(self) -> None:
        c, job = self.config, self.job
        harmless = () if c.method.routed else ("micro_batch_size",)  # which sentences a routed update reads
        settings = {name: v for name, v in of_stage(c.train, "train").items() if name not in harmless}
        settings |= {"train_sentences": c.train_sentences, "dev_sentences": c.data.dev_sentences}
        settings |= {"train_pairs": list(c.data.train_pairs)} if c.data.train_pairs else {}

        def work() -> None:
            sentences = job.examples("train", c.train_sentences, c.data.train_pairs)
            dev = job.examples("dev", c.data.dev_sentences, c.data.train_pairs) if c.data.dev_sentences else []
            train.train_and_choose(job, sentences, dev, self.stages.settings)

        self.stages.do("train", job.method_settings() | {"train": settings}, self.out / "chosen.json", work)

    def _export(self) -> None:
        job, method = self.job, self.config.method
        if method.merges:
            train.export_merged(self.config, job.base, job.shape, tokens.ends(job.tokenizer))
        else:
            train.export_attached(method, self.out, job.base, job.base_name)

    def _delta(self) -> None:
        train.write_delta(self.config.method, self.out, self.job.base)

    def _adapter(self) -> None:
        kind, name = self.config.export.adapter, self.job.base_name
        work = lambda: distributed.first(lambda: train.write_adapter(self.config.method, self.out, name, kind))  # noqa: E731
        self.stages.aside("adapter", {"adapter": kind}, self.out / "adapter", work)

    def _translate(self) -> None:
        """Translations of what is compared."""
        c, job, method, folder = self.config, self.job, self.config.method, self.out / "translations"
        decoding = of_stage(c.evaluate, "decode") | of_stage(c.data, "decode")
        decoding |= {"test": {s.domain: s.fingerprint for s in job.report.splits if s.name == "test"}}
        on = c.measured_on
        decoding |= {"on": on} if c.quantised else {}
        distributed.first(lambda: measure.bring_translations(folder, on))
        which = " in full precision" if c.quantised and on == "full" else ""  # stages of their own: both are kept
        if "base" in job.systems:
            base = lambda: warned(job, job.decoder())  # noqa: E731
            work = lambda: measure.translate(job, "base", base, job.base, self.stages.settings)  # noqa: E731
            self.stages.do(f"translate base{which}", {"decode": decoding}, folder / "base", work)
        if not method.is_base:
            own = {} if method.trains else job.method_settings()  # a trained method's are there already
            artefact = folder / method.kind
            self.stages.do(f"translate{which}", {"decode": decoding} | own, artefact, self._translate_trained)

    def _translate_trained(self) -> None:
        job, method = self.job, self.config.method
        model = job.base if not method.trains else self.out / method.trained_folder
        load_it = lambda: measure.load_trained(job, model)  # noqa: E731
        measure.translate(job, method.kind, load_it, model, self.stages.settings, measure.shots(job))

    def _evaluate(self, comet_said: dict[str, Any]) -> dict[str, Any]:
        """results.json and report.html; the first rank alone."""
        c, job, tests = self.config, self.job, self.job.tests()
        results.write_sides(self.out, tests)
        found = results.scores(self.out, job.directions, job.systems, tests, c.evaluate.smooth)
        found |= results.training(self.out)
        about: dict[str, Any] = {"slicetune": __version__, "method": c.method.kind, "model": c.model.path}
        about |= {"train_sentences": c.train_sentences} if c.method.trains else {}
        about |= {"quantize": c.model.quantize, "measured_on": c.measured_on} if c.quantised else {}
        if asked := known(job):
            about |= {"prompt": asdict(asked)}
        about |= {"lost_targets": {name: asdict(lost) for name, lost in job.lost.items()}} if job.lost else {}
        about |= {"seconds": self.stages.seconds(), "peak_memory": self.stages.peaks(), "ranks": distributed.world()}
        return measure.write_results(self.out, found, comet_said, about)


def be_deterministic() -> None:
    """Deterministic kernels everywhere: torch's, cuBLAS's (a fixed workspace) and flash-attn's backward."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
    torch.use_deterministic_algorithms(True)
