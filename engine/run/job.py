"""The main job: text → scores → neurons → trained slices → model → translations → results, stage by stage.

Each stage leaves an artefact under `--out` and is skipped when that is there and was made with the same settings
(stages.py). All ranks walk through the same stages; what only one can do, the first one does. What a stage does is in
choosing_stages.py (landermt/stages.py for LANDeRMT), training_stages.py and decoding_stages.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common import distributed
from ..common.errors import UserError
from ..common.files import contents, write_atomically
from ..common.settings import as_dict
from ..data import corpus, records
from ..data.batching import Example
from ..data.examples import examples
from ..evaluation.report.run import table
from ..methods.landermt import detection
from ..methods.landermt.routes import ROUTES, Routes
from ..models import attention, baichuan
from ..models import load as models
from ..models.shapes import ModelShape, from_config
from ..scoring.config import lasting
from ..scoring.cross_entropy import loss_path
from ..slices.neurons import NeuronSet
from . import choose as choosing_stages
from . import detect as detection_stages
from . import measure
from . import measure as decoding_stages
from . import train as training_stages
from .config import RunConfig
from .stages import Stages, named


class Run:
    """One run: its settings, its folder, and what its stages share."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.out = config, Path(config.out)
        self.report = distributed.first_rank_first(lambda: corpus.check(config.data))  # before any weight is fetched
        distributed.print0(self.report)
        self.directions = corpus.directions(config.data)
        self.base = Path(distributed.first_rank_first(lambda: models.snapshot(config.model.path)))
        self.tokenizer = models.load_tokenizer(str(self.base))
        self.shape: ModelShape = from_config(models.read_config(self.base))
        self.device = distributed.device()
        self.stages = Stages(self.out)
        self.peak = 0
        distributed.print0(self._capabilities())

    def all(self) -> dict[str, Any]:
        """Every stage; returns the content of results.json."""
        self.train_stages()
        self._decode_stages()
        said = measure.stage(self.config, self.systems, self.stages, self.tests)
        with named("evaluate"):
            found = distributed.share_object(distributed.first(lambda: decoding_stages.evaluate(self, said)))
        distributed.print0(table(found))
        return found

    def select_stages(self) -> None:
        """From scores to the chosen neurons, as far as the method needs them."""
        c, out, do = self.config, self.out, self._do
        if distributed.rank() == 0:
            write_atomically(self.out / "config.json", json.dumps(as_dict(c), indent=1))
        kept = ("pairs" if c.data.pairs else "pair", "seen", "prompt", "score_sentences", "max_length")
        data = {k: v for k, v in as_dict(c.data).items() if k in kept}
        source = {"model": models.fingerprint(self.base), "corpus": self.report.fingerprint}
        self.stages.settings |= source | {"data": data, "seed": c.seed}
        if c.model.recompute_ffn and not (c.method.selects or c.method.routed):
            raise UserError(
                f"--model.recompute-ffn: {c.method.title} trains no slices; use --model.activation-checkpointing"
            )
        method = self.method_settings()
        if c.method.scores:
            do("score", {"score": lasting(c.score)}, self.scores, choosing_stages.score)
        if c.method.selects:
            do("select", method, out / "neurons.safetensors", choosing_stages.select, alone=True)
        if c.method.routes:
            do("select", method, out / ROUTES, detection_stages.select)

    def train_stages(self) -> None:
        """`select_stages`, and on to the exported model."""
        self.select_stages()
        c, out, do = self.config, self.out, self._do
        if c.method.trains:
            method = self.method_settings()
            sentences = {"train_sentences": c.train_sentences, "dev_sentences": c.data.dev_sentences}
            sentences |= {"train_pairs": list(c.data.train_pairs)} if c.data.train_pairs else {}
            do(
                "train",
                method | {"train": _lasting(c) | sentences},
                out / "chosen.json",
                training_stages.train_and_choose,
            )
            do("export", {"dtype": c.evaluate.dtype}, self.trained, training_stages.export, alone=True)
        if c.method.selects or (c.method.routed and not c.method.attention):
            do("delta", {}, out / "delta", training_stages.write_delta, alone=True)

    def _decode_stages(self) -> None:
        """Translations of what is compared; the adapter comes last, so that asking for it later undoes nothing."""
        c, out, do = self.config, self.out, self._do
        apart = ("batch_size", "base", "dtype", "smooth", "comet", "comet_python")
        decoding = {k: v for k, v in as_dict(c.evaluate).items() if k not in apart}
        decoding |= {"unseen": list(c.data.unseen), "test_sentences": c.data.test_sentences}
        decoding |= {"test": {s.domain: s.fingerprint for s in self.report.splits if s.name == "test"}}
        if "base" in self.systems:
            do(
                "translate base",
                {"decode": decoding},
                out / "translations/base",
                decoding_stages.translate_base,
            )
        if self.name != "base":
            own = {} if c.method.trains else self.method_settings()  # a trained method's are there already
            do(
                "translate",
                {"decode": decoding} | own,
                out / "translations" / self.name,
                decoding_stages.translate_trained,
            )
        if c.export.adapter != "none":
            do("adapter", {"adapter": c.export.adapter}, out / "adapter", training_stages.write_adapter, alone=True)

    def _do(
        self, name: str, settings: dict[str, Any], artefact: Path, work: Callable[[Run], Any], alone: bool = False
    ) -> None:
        """A stage: `work` on every rank, or (`alone`) on the first while the others wait."""
        self.stages.do(name, settings, artefact, lambda: distributed.first(lambda: work(self)) if alone else work(self))

    def method_settings(self) -> dict[str, Any]:
        """What the choice of neurons and the training depend on: the method's fields, and the files that they name."""
        method = self.config.method
        files = distributed.share_object(distributed.first(lambda: contents(method.reads)))
        return {"method": as_dict(method)} | ({"method_files": files} if files else {})

    @property
    def name(self) -> str:
        return self.config.method.kind

    @property
    def systems(self) -> list[str]:
        """What is decoded: the base model unless that was turned off, and what the method makes of it."""
        return ["base"] * (self.config.evaluate.base or self.name == "base") + [self.name] * (self.name != "base")

    @property
    def base_name(self) -> str:
        """What an adapter names as its base: --model.path, or the Llama that a Baichuan2 was converted to."""
        return str(self.base) if self.base.name.startswith(baichuan.PREFIX) else self.config.model.path

    @property
    def trained(self) -> Path:
        """What was trained: a plain model, or what is attached to the base."""
        return self.out / ("model" if self.config.method.merges else "attached")

    @property
    def scores(self) -> Path:
        """What the score stage leaves."""
        return self.out / (detection.SCORES if self.config.method.routes else "statistics.safetensors")

    @property
    def selected(self) -> NeuronSet | Routes | None:
        """The neurons or the routes that were selected; None where the method selects nothing."""
        if self.config.method.routes:
            return Routes.load(self.out / ROUTES)
        return NeuronSet.load(self.out / "neurons.safetensors") if self.config.method.selects else None

    def _capabilities(self) -> str:
        model, device = self.config.model, self.device
        dtype = models.model_dtype(model.dtype, device)
        path = attention.attention_path(model.attention, device, models.read_config(self.base), dtype)
        return (
            f"{distributed.world()} rank(s) on {device.type}, torch {torch.__version__}, "
            f"{str(dtype).removeprefix('torch.')}, attention {path.removeprefix('slicetune_')}, loss in "
            f"{loss_path(device)}, ZeRO stage {self.config.zero.stage}; {self.shape.name}: {self.shape.neurons:,} "
            f"neurons, {self.shape.parameters:,} parameters"
        )

    def examples(self, split: str, limit: int, only: Sequence[str] = ()) -> list[Example]:
        """Tokenised sentences of the seen domains of each direction, or of those; what was dropped is printed."""
        kept = []
        for data in self.directions:
            if only and data.pair not in only:
                continue
            for domain in data.seen:
                pairs = corpus.load_domain(data, domain, split, limit, self.config.seed)
                found, dropped = examples(
                    self.tokenizer, data, pairs, data.groups, split, data.max_length, self.config.seed
                )
                for reason, count in dropped.items():
                    distributed.print0(f"{split}: {count} of {len(pairs)} sentences dropped, {reason}")
                if not found:
                    name = f"{data.name(domain)}/{split}"
                    raise UserError(f"{name}: no sentence is left: raise --data.max-length, or look at the file")
                kept += found
        return kept

    def tests(self) -> dict[str, list[records.Pair]]:
        """Sentences to decode, by the name of their domain in the run: first a direction's seen, then its unseen."""
        limit = self.config.data.test_sentences
        return {
            data.name(domain): corpus.load_domain(data, domain, "test", limit)
            for data in self.directions
            for domain in data.domains
        }

    def model(self, folder: Path) -> nn.Module:
        return models.load_model(str(folder), self.config.model, self.device)


def _lasting(config: RunConfig) -> dict[str, Any]:
    """Training settings that decide the result; how often it is logged or saved does not."""
    harmless = ["logging_steps", "report_to", "save_steps", "save_total_limit", "loss_spike", "non_finite"]
    harmless += [] if config.method.routed else ["micro_batch_size"]  # which sentences a routed update reads
    return {k: v for k, v in asdict(config.train).items() if k not in harmless}
