"""The main job: text → scores → neurons → trained slices → model → translations → results, stage by stage.

Each stage leaves an artefact under `--out` and is skipped when that is there and was made with the same settings
(stages.py). All ranks walk through the same stages; what only one can do, the first one does.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import (
    adapter,
    baichuan,
    bottleneck,
    checkpoint,
    comet,
    corpus,
    delta,
    detection_stages,
    distributed,
    models,
    prompts,
    results,
    signals,
    status,
)
from .batching import Example, examples
from .config import RunConfig, as_dict
from .errors import UserError
from .export import export_model, summary
from .methods.few_shot import FewShot, fit
from .methods.lora import Lora
from .metrics import peak_memory, reset_peak_memory
from .neurons import NeuronSet
from .progress import Translated
from .report import table, write_report
from .routed_export import load_routed
from .routed_export import trained as trained_routes
from .routes import ROUTES, Routes
from .score import lasting, scored
from .shapes import ModelShape, from_config
from .slices import Patch
from .stages import Lock, Stages, contents, write_atomically
from .statistics import Statistics
from .training import train
from .translation import gather, translate


def run(config: RunConfig) -> dict[str, Any]:
    """Run every stage that is not done; returns the content of results.json. Raises UserError for bad input."""
    distributed.start()
    found = run_one(config)
    distributed.stop()  # after an error cli.one_line does, once it has said what is wrong
    return found


def run_one(config: RunConfig, work: Callable[[Run], Any] | None = None) -> Any:
    """`run` among ranks that are up already and stay so: one of several runs in the same processes (compare.py).

    `work` says how far: Run.select_stages, Run.train_stages, or (the default) Run.all; returns what that returns.
    """
    lock = Lock(Path(config.out))
    with lock, status.recorded(lock.out):
        torch.manual_seed(config.seed)
        reset_peak_memory()
        if config.deterministic:
            be_deterministic()
        return (work or Run.all)(Run(config))


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
        said = comet.stage(self.config, self.systems, self.stages, self.tests)
        found = distributed.share_object(distributed.first(lambda: self.evaluate(said)))
        distributed.print0(table(found))
        return found

    def select_stages(self) -> None:
        """From scores to the chosen neurons, as far as the method needs them."""
        c, out, do = self.config, self.out, self.stages.do
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
            do("score", {"score": lasting(c.score)}, self.scores, self.score_or_reuse)
        if c.method.selects:
            do("select", method, out / "neurons.safetensors", lambda: distributed.first(self.select))
        if c.method.routes:
            do("select", method, out / ROUTES, lambda: detection_stages.select(self))

    def train_stages(self) -> None:
        """`select_stages`, and on to the exported model."""
        self.select_stages()
        c, out, do = self.config, self.out, self.stages.do
        if c.method.trains:
            method = self.method_settings()
            sentences = {"train_sentences": c.train_sentences, "dev_sentences": c.data.dev_sentences}
            sentences |= {"train_pairs": list(c.data.train_pairs)} if c.data.train_pairs else {}
            do("train", method | {"train": _lasting(c) | sentences}, out / "chosen.json", self.train)
            do("export", {"dtype": c.evaluate.dtype}, self.trained, lambda: distributed.first(self.export))
        if c.method.selects or (c.method.routed and not c.method.attention):
            do("delta", {}, out / "delta", lambda: distributed.first(self.delta))

    def _decode_stages(self) -> None:
        """Translations of what is compared; the adapter comes last, so that asking for it later undoes nothing."""
        c, out, do = self.config, self.out, self.stages.do
        apart = ("batch_size", "base", "dtype", "smooth", "comet", "comet_python")
        decoding = {k: v for k, v in as_dict(c.evaluate).items() if k not in apart}
        decoding |= {"unseen": list(c.data.unseen), "test_sentences": c.data.test_sentences}
        decoding |= {"test": {s.domain: s.fingerprint for s in self.report.splits if s.name == "test"}}
        if "base" in self.systems:
            do("translate base", {"decode": decoding}, out / "translations/base", self.translate_base)
        if self.name != "base":
            own = {} if c.method.trains else self.method_settings()  # a trained method's are there already
            do("translate", {"decode": decoding} | own, out / "translations" / self.name, self.translate)
        if c.export.adapter != "none":
            do("adapter", {"adapter": c.export.adapter}, out / "adapter", lambda: distributed.first(self.adapter))

    def method_settings(self) -> dict[str, Any]:
        """What the choice of neurons and the training depend on: the method's fields, and the files that they name."""
        method = self.config.method
        files = distributed.share_object(distributed.first(lambda: contents(method.reads)))
        return {"method": as_dict(method)} | ({"method_files": files} if files else {})

    @property
    def name(self) -> str:
        return self.config.method.name

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
        return self.out / (detection_stages.SCORES if self.config.method.routes else "statistics.safetensors")

    @property
    def selected(self) -> NeuronSet | Routes | None:
        """The neurons or the routes that were selected; None where the method selects nothing."""
        if self.config.method.routes:
            return Routes.load(self.out / ROUTES)
        return NeuronSet.load(self.out / "neurons.safetensors") if self.config.method.selects else None

    def _capabilities(self) -> str:
        dtype = str(models.model_dtype(self.config.model.dtype, self.device)).removeprefix("torch.")
        attention = models.attention_path(
            self.config.model.attention, self.device, models.read_config(self.base)["model_type"]
        )
        return (
            f"{distributed.world()} rank(s) on {self.device.type}, torch {torch.__version__}, {dtype}, attention "
            f"{attention}, ZeRO stage {self.config.zero.stage}; {self.shape.name}: {self.shape.neurons:,} neurons, "
            f"{self.shape.parameters:,} parameters"
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

    def tests(self) -> dict[str, list[corpus.Pair]]:
        """Sentences to decode, by the name of their domain in the run: first a direction's seen, then its unseen."""
        limit = self.config.data.test_sentences
        return {
            data.name(domain): corpus.load_domain(data, domain, "test", limit)
            for data in self.directions
            for domain in data.domains
        }

    def model(self, folder: Path) -> nn.Module:
        return models.load_model(str(folder), self.config.model, self.device)

    # ---------------------------------------------------------------- the stages

    def score_or_reuse(self) -> None:
        if not self.config.score.reuse:
            return self.score()
        other = Path(self.config.score.reuse)
        distributed.first(lambda: self.stages.take("score", other, self.scores))
        distributed.print0(f"the scores of {other} are taken")

    def score(self) -> None:
        if self.config.method.routes:
            return detection_stages.score(self)
        c, load = self.config, lambda: self.model(self.base)
        data = self.examples("train", c.data.score_sentences)
        distributed.print0("one of them, what is trained between brackets:\n" + prompts.show(self.tokenizer, data[0]))
        identity, pad_id = self.stages.settings, self.tokenizer.pad_token_id
        stats, clear = scored(load, data, c.data.groups, self.shape, c.score, self.out, identity, pad_id)
        self.peak = max(self.peak, peak_memory())
        if distributed.rank() == 0:
            stats.save(self.out / "statistics.safetensors", self.stages.settings)
        clear()

    def select(self) -> None:
        method = self.config.method
        stats = Statistics.load(self.out / "statistics.safetensors") if method.scores else None
        neurons, warnings = method.select(stats, self.shape, self.config.seed)
        neurons.provenance |= {"run": self.stages.settings}
        print(neurons.describe(), flush=True)
        for warning in warnings:
            print(f"warning: {warning}", flush=True)
        neurons.save(self.out / "neurons.safetensors")

    def train(self) -> None:
        """Train once, or once a rate of the sweep; `chosen.json` names the checkpoint to export."""
        c = self.config
        if c.train.sweep and not c.data.dev_sentences:
            raise UserError("--train.sweep chooses by dev loss: set --data.dev-sentences above 0")
        if c.train.sweep and c.resume != "auto":
            raise UserError(f"--resume {c.resume}: a sweep has a checkpoint for each rate: use --resume auto")
        train_set = self.examples("train", c.train_sentences, c.data.train_pairs)
        dev = self.examples("dev", c.data.dev_sentences, c.data.train_pairs) if c.data.dev_sentences else []
        selected, method = self.selected, c.method
        identity = {"neurons": selected.fingerprint if selected else "", "settings": self.stages.settings}
        trained, pad_id = {}, self.tokenizer.pad_token_id
        for rate in c.train.sweep or (c.train.learning_rate,):
            model = self.model(self.base)
            method.prepare(model, selected, c)
            counts = self._count(model)
            one = replace(c, train=replace(c.train, learning_rate=rate, sweep=()))
            folder = self.out / "sweep" / f"lr-{rate:g}" if c.train.sweep else self.out
            whose = identity | {"learning_rate": rate}
            trained[rate] = train(model, one, train_set, dev, folder, pad_id=pad_id, identity=whose)
            del model
        self.peak = max(self.peak, peak_memory())
        if distributed.rank() == 0:
            self._choose(trained, counts)

    def _count(self, model: nn.Module) -> dict[str, int]:
        """Parameters that training will change, and those that the base does not have; printed."""
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        added = self.config.method.bounds(self.shape).added
        share = f"{trained / self.shape.parameters:.2%} of the model's {self.shape.parameters:,}"
        distributed.print0(f"{self.config.method.title}: {trained:,} trainable parameters ({share}), {added:,} added")
        return {"trainable_parameters": trained, "added_parameters": added}

    def _choose(self, trained: dict[float, Path], counts: dict[str, int]) -> None:
        losses = {rate: checkpoint.read_state(folder)["best_dev_loss"] for rate, folder in trained.items()}
        best = min(losses, key=losses.__getitem__)
        for rate, loss in losses.items() if len(losses) > 1 else ():
            print(f"learning rate {rate:g}: dev loss {loss:.4f}{'  ← taken' if rate == best else ''}", flush=True)
        if len(losses) > 1:
            shutil.copy(trained[best].parents[1] / "metrics.jsonl", self.out / "metrics.jsonl")
        chosen = {"checkpoint": str(trained[best].relative_to(self.out)), "learning_rate": best, "dev_loss": losses}
        chosen |= counts | {"peak_memory_bytes": self.peak}
        write_atomically(self.out / "chosen.json", json.dumps(chosen, indent=1))

    @property
    def chosen(self) -> dict[str, Any]:
        return json.loads((self.out / "chosen.json").read_text())

    def export(self) -> None:
        if not self.config.method.merges:
            tensors, _ = checkpoint.load(self.out / self.chosen["checkpoint"])
            known = models.fingerprint(self.base)
            print(bottleneck.save(self.trained, self.config.method, self.base_name, known, tensors), flush=True)
            return
        expansion = self.config.method.expansion(self.shape.layers)
        dtype = self.config.evaluate.dtype
        print(summary(export_model(self.base, self.patches(), self.out / "model", dtype, expansion)), flush=True)
        if self.config.method.routed:
            tensors, _ = checkpoint.load(self.out / self.chosen["checkpoint"])
            trained_routes(self.base, self.selected, tensors).save(self.trained / ROUTES)

    def patches(self) -> dict[str, Patch]:
        tensors, _ = checkpoint.load(self.out / self.chosen["checkpoint"])
        return self.config.method.patches(self.base, self.selected, tensors)

    def delta(self) -> None:
        print(delta.write(self.base, self.out / "model", self.patches(), self.out / "delta"), flush=True)

    def adapter(self) -> None:
        method = self.config.method
        if isinstance(method, Lora):
            tensors, _ = checkpoint.load(self.out / self.chosen["checkpoint"])
            adapter.write_lora(method, tensors, self.base_name, self.out / "adapter")
        else:
            ranks = self.config.export.adapter == "ranks"
            adapter.write(self.out / "delta", self.base_name, self.out / "adapter", ranks)

    def translate_base(self) -> None:
        self._translate(lambda: self.model(self.base), "base", self.base)

    def translate(self) -> None:
        few_shot = isinstance(self.config.method, FewShot)
        self._translate(self._load_trained, self.name, self.base if few_shot else self.trained)

    def _load_trained(self) -> nn.Module:
        """The model that the method gives, ready to decode."""
        if isinstance(self.config.method, FewShot):
            return self.model(self.base)
        if self.config.method.routed:
            return load_routed(self.trained, self.config.model, self.device)
        if self.config.method.merges:
            return self.model(self.trained)
        return bottleneck.load(self.trained, str(self.base), self.config.model, self.device)

    def _translate(self, load: Callable[[], nn.Module], system: str, folder: Path) -> None:
        """Translate every test set that is not yet; `load` gives the model, whose files are in `folder`."""
        evaluate, prompt = self.config.evaluate, prompts.resolve(self.config.data, self.config.seed)
        shots = self.shots(prompt) if system == "few_shot" else {}
        identity = {"settings": self.stages.settings, "model": models.fingerprint(folder)}
        finished, model = Translated(self.out / "translations" / system, identity), None
        for name, pairs in self.tests().items():
            file = results.translations(self.out, system, name, pairs[0].languages[1]).name
            if finished.has(file):
                distributed.print0(f"{system}: {name}: translated before")
                continue
            model = model or load()
            mine = translate(
                model,
                self.tokenizer,
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

    def shots(self, prompt: prompts.Prompt) -> dict[str, list[list[corpus.Pair]]]:
        """The examples of each test sentence, by the name of its domain; how many did not fit is printed."""
        tests, limit, found = self.tests(), self.config.data.max_length, {}
        for data in self.directions:
            for domain in data.domains:
                name = data.name(domain)
                drawn = self.config.method.examples(data, domain, tests[name], self.config.seed)
                found[name], short = fit(self.tokenizer, prompt, tests[name], drawn, limit)
                if short:
                    what = f"{short} of {len(drawn)} prompts have fewer examples than --method.shots"
                    distributed.print0(f"{name}: {what}, to keep to --data.max-length {limit}")
        return found

    def evaluate(self, comet_said: dict[str, Any]) -> dict[str, Any]:
        tests = self.tests()
        results.write_sides(self.out, tests)
        found = results.scores(self.out, self.directions, self.systems, tests, self.config.evaluate.smooth)
        found |= results.training(self.out)
        comet.add(found, comet_said, self.out)
        found |= {"method": self.name, "model": self.config.model.path}
        found |= {"train_sentences": self.config.train_sentences} if self.config.method.trains else {}
        found |= {"seconds": self.stages.seconds(), "ranks": distributed.world()}
        write_atomically(self.out / "results.json", json.dumps(found, indent=1))
        found["report"] = str(write_report(self.out))
        return found


def be_deterministic() -> None:
    """Deterministic kernels everywhere: torch's, cuBLAS's (a fixed workspace) and flash-attn's backward."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
    torch.use_deterministic_algorithms(True)


def _lasting(config: RunConfig) -> dict[str, Any]:
    """Training settings that decide the result; how often it is logged or saved does not."""
    harmless = ["logging_steps", "report_to", "save_steps", "save_total_limit", "loss_spike", "non_finite"]
    harmless += [] if config.method.routed else ["micro_batch_size"]  # which sentences a routed update reads
    return {k: v for k, v in asdict(config.train).items() if k not in harmless}
