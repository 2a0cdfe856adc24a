"""The main job: text → scores → neurons → trained slices → model → translations → results, stage by stage.

Each stage leaves an artefact under `--out` and is skipped when that is there and was made with the same settings
(stages.py). All ranks walk through the same stages; what only one can do, the first one does.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import checkpoint, corpus, distributed, models, prompts, signals, status
from .batching import Example, examples
from .config import RunConfig, as_dict
from .errors import UserError
from .evaluation import score_system
from .export import export_model, summary
from .ffn import attach, find_ffns
from .metrics import peak_memory
from .neurons import NeuronSet
from .progress import Progress
from .report import table, write_report
from .scoring import counts_device, score
from .selection import select
from .shapes import ModelShape, from_config
from .slices import Patch
from .stages import Lock, Stages, write_atomically
from .statistics import Statistics
from .training import train
from .translation import gather, translate, write_lines


def run(config: RunConfig) -> dict[str, Any]:
    """Run every stage that is not done; returns the content of results.json. Raises UserError for bad input."""
    distributed.start()
    lock = Lock(Path(config.out))
    with status.recorded(lock.out):
        torch.manual_seed(config.seed)
        if config.deterministic:
            be_deterministic()
        results = Run(config).all()
    distributed.stop()  # after an error cli.one_line does, once it has said what is wrong
    return results


class Run:
    """One run: its settings, its folder, and what its stages share."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.out = config, Path(config.out)
        self.report = _first_rank_first(lambda: corpus.check(config.data))  # before any weight is fetched
        distributed.print0(self.report)
        self.base = Path(_first_rank_first(lambda: models.snapshot(config.model.path)))
        self.tokenizer = models.load_tokenizer(str(self.base))
        self.shape: ModelShape = from_config(models.read_config(self.base))
        self.device = distributed.device()
        self.stages = Stages(self.out)
        self.peak = 0
        distributed.print0(self._capabilities())

    def all(self) -> dict[str, Any]:
        c = self.config
        if distributed.rank() == 0:
            write_atomically(self.out / "config.json", json.dumps(as_dict(c), indent=1))
        data = {
            k: v for k, v in as_dict(c.data).items() if k in ("pair", "seen", "prompt", "score_sentences", "max_length")
        }
        source = {
            "model": fingerprint_model(self.base),
            "corpus": self.report.fingerprint,
            "data": data,
            "seed": c.seed,
        }
        scoring = {k: v for k, v in as_dict(c.score).items() if k not in ("tokens_per_batch", "counts", "save_minutes")}
        self.stages.do("score", source | {"score": scoring}, self.out / "statistics.safetensors", self.score)
        self.stages.do("select", {"method": as_dict(c.method)}, self.out / "neurons.safetensors", self.select)
        sentences = {"train_sentences": c.data.train_sentences, "dev_sentences": c.data.dev_sentences}
        self.stages.do("train", {"train": _lasting(c) | sentences}, self.out / "chosen.json", self.train)
        self.stages.do("export", {"dtype": c.evaluate.dtype}, self.out / "model", self.export)
        decoding = {k: v for k, v in as_dict(c.evaluate).items() if k not in ("batch_size", "base", "dtype")}
        decoding |= {"unseen": list(c.data.unseen), "test_sentences": c.data.test_sentences}
        decoding |= {"test": {s.domain: s.fingerprint for s in self.report.splits if s.name == "test"}}
        if c.evaluate.base:
            self.stages.do("translate base", {"decode": decoding}, self.out / "translations/base", self.translate_base)
        self.stages.do("translate", {"decode": decoding}, self.out / "translations" / self.name, self.translate)
        results = distributed.share_object(self.evaluate() if distributed.rank() == 0 else None)
        distributed.print0(table(results))
        return results

    @property
    def name(self) -> str:
        return type(self.config.method).__name__.lower()

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

    def examples(self, split: str, limit: int) -> list[Example]:
        """Tokenised sentences of the seen domains, in the domains' order; what was dropped is printed."""
        data, kept = self.config.data, []
        for domain in data.seen:
            pairs = corpus.load_domain(data, domain, split, limit, self.config.seed)
            found, dropped = examples(self.tokenizer, data, pairs, data.seen, split, data.max_length)
            for reason, count in dropped.items():
                distributed.print0(f"{split}: {count} of {len(pairs)} sentences dropped, {reason}")
            if not found:
                raise UserError(f"{domain}/{split}: no sentence is left: raise --data.max-length, or look at the file")
            kept += found
        return kept

    def test(self, domain: str) -> list[corpus.Pair]:
        return corpus.load_domain(self.config.data, domain, "test", self.config.data.test_sentences, self.config.seed)

    def model(self, folder: Path) -> nn.Module:
        return models.load_model(str(folder), self.config.model, self.device)

    # ---------------------------------------------------------------- the stages

    def score(self) -> None:
        from tqdm import tqdm

        data = self.examples("train", self.config.data.score_sentences)
        distributed.print0("one of them, what is trained between brackets:\n" + prompts.show(self.tokenizer, data[0]))
        where = counts_device(self.config.score, self.shape, len(self.config.data.seen), self.device)
        stats = Statistics(list(self.config.data.seen), self.shape, self.config.score.lowest_octave, where)
        identity = {"settings": _digest(self.stages.settings), "tokens_per_batch": self.config.score.tokens_per_batch}
        partial = Progress(self.out, identity, self.config.score.save_minutes)
        stats, done = partial.resume(stats)
        bar = tqdm(total=len(data), desc="score", unit="sentence", mininterval=2, disable=distributed.rank() != 0)
        model = self.model(self.base)
        rank, world = distributed.rank(), distributed.world()
        pad_id = self.tokenizer.pad_token_id
        step = lambda n: bar.update(n * world)  # noqa: E731
        score(
            model,
            data,
            stats,
            self.config.score,
            pad_id=pad_id,
            rank=rank,
            world=world,
            progress=step,
            done=done,
            after_batch=lambda done: partial.after_batch(stats, done),
        )
        bar.update(bar.total - bar.n)  # ranks end a few sentences apart
        bar.close()
        self.peak = max(self.peak, peak_memory())
        if rank == 0:
            stats.save(self.out / "statistics.safetensors", self.stages.settings)
        partial.clear()

    def select(self) -> None:
        if distributed.rank() != 0:
            return
        chosen = select(Statistics.load(self.out / "statistics.safetensors"), self.config.method)
        neurons = chosen.neurons
        neurons.provenance |= {"run": self.stages.settings}
        print(neurons.describe(), flush=True)
        for warning in chosen.warnings:
            print(f"warning: {warning}", flush=True)
        neurons.save(self.out / "neurons.safetensors")

    def train(self) -> None:
        """Train once, or once a rate of the sweep; `chosen.json` names the checkpoint to export."""
        c = self.config
        if c.train.sweep and not c.data.dev_sentences:
            raise UserError("--train.sweep chooses by dev loss: set --data.dev-sentences above 0")
        train_set = self.examples("train", c.data.train_sentences)
        dev = self.examples("dev", c.data.dev_sentences) if c.data.dev_sentences else []
        neurons = NeuronSet.load(self.out / "neurons.safetensors")
        identity = {"neurons": neurons.fingerprint, "settings": _digest(self.stages.settings)}
        trained, pad_id = {}, self.tokenizer.pad_token_id
        for rate in c.train.sweep or (c.train.learning_rate,):
            model = self.model(self.base)
            attach(model, neurons, c.model.recompute_ffn)
            one = replace(c, train=replace(c.train, learning_rate=rate, sweep=()))
            folder = self.out / "sweep" / f"lr-{rate:g}" if c.train.sweep else self.out
            trained[rate] = train(model, one, train_set, dev, folder, pad_id=pad_id, identity=identity)
            del model
        self.peak = max(self.peak, peak_memory())
        if distributed.rank() == 0:
            self._choose(trained)

    def _choose(self, trained: dict[float, Path]) -> None:
        losses = {rate: checkpoint.read_state(folder)["best_dev_loss"] for rate, folder in trained.items()}
        best = min(losses, key=losses.__getitem__)
        for rate, loss in losses.items() if len(losses) > 1 else ():
            print(f"learning rate {rate:g}: dev loss {loss:.4f}{'  ← taken' if rate == best else ''}", flush=True)
        if len(losses) > 1:
            shutil.copy(trained[best].parents[1] / "metrics.jsonl", self.out / "metrics.jsonl")
        chosen = {"checkpoint": str(trained[best].relative_to(self.out)), "learning_rate": best, "dev_loss": losses}
        write_atomically(self.out / "chosen.json", json.dumps(chosen | {"peak_memory_bytes": self.peak}, indent=1))

    @property
    def chosen(self) -> dict[str, Any]:
        return json.loads((self.out / "chosen.json").read_text())

    def export(self) -> None:
        if distributed.rank() != 0:
            return
        neurons = NeuronSet.load(self.out / "neurons.safetensors")
        patches = slice_patches(self.base, neurons, self.out / self.chosen["checkpoint"])
        result = export_model(self.base, patches, self.out / "model", self.config.evaluate.dtype)
        print(summary(result), flush=True)

    def translate_base(self) -> None:
        self._translate(self.base, "base")

    def translate(self) -> None:
        self._translate(self.out / "model", self.name)

    def _translate(self, folder: Path, system: str) -> None:
        model = self.model(folder)
        data, evaluate = self.config.data, self.config.evaluate
        for domain in data.domains:
            pairs = self.test(domain)
            mine = translate(
                model,
                self.tokenizer,
                prompts.resolve(data),
                (data.source, data.target),
                pairs,
                evaluate.batch_size,
                evaluate.max_new_tokens,
                distributed.rank(),
                distributed.world(),
                lambda done, batches: signals.boundary(f"decoding {domain}"),  # noqa: B023  (called before the next domain)
            )
            lines = gather(mine)
            if distributed.rank() == 0:
                write_lines(self.out / "translations" / system / f"{domain}.{data.target}", lines)
            distributed.print0(f"{system}: {domain}: {len(pairs)} sentences translated")

    def evaluate(self) -> dict[str, Any]:
        data, systems = self.config.data, {}
        pairs = {d: self.test(d) for d in data.domains}
        references = {d: [p.target for p in pairs[d]] for d in data.domains}
        for d in data.domains:  # beside the systems' lines, for the report and for sacrebleu's command line
            lines = (
                [" ".join(t.splitlines()) for t in side]
                for side in zip(*((p.source, p.target) for p in pairs[d]), strict=True)
            )
            for kind, code, side in zip(("source", "reference"), (data.source, data.target), lines, strict=True):
                write_lines(self.out / "translations" / kind / f"{d}.{code}", side)
        for system in [*(["base"] if self.config.evaluate.base else []), self.name]:
            folder = self.out / "translations" / system
            lines = {
                d: (folder / f"{d}.{data.target}").read_text(encoding="utf-8").split("\n")[:-1] for d in data.domains
            }
            systems[system] = score_system(lines, references, data.target, data.seen, data.unseen)
        results = {"systems": systems, "seen": list(data.seen), "unseen": list(data.unseen), "method": self.name}
        results |= self._facts()
        write_atomically(self.out / "results.json", json.dumps(results, indent=1))
        results["report"] = str(write_report(self.out))
        return results

    def _facts(self) -> dict[str, Any]:
        neurons = NeuronSet.load(self.out / "neurons.safetensors")
        rows = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        rates = sorted(row["tokens_per_second"] for row in rows if "tokens_per_second" in row)
        return {
            "model": self.config.model.path,
            "trainable_parameters": neurons.parameters(self.shape.mlp_bias),
            "added_parameters": 0,
            "neurons": neurons.count,
            "total_neurons": self.shape.neurons,
            "learning_rate": self.chosen["learning_rate"],
            "sweep": self.chosen["dev_loss"],
            "tokens_per_second": rates[len(rates) // 2],
            "peak_memory_bytes": self.chosen["peak_memory_bytes"],
            "seconds": self.stages.seconds(),
            "ranks": distributed.world(),
        }


def slice_patches(base: Path, neurons: NeuronSet, folder: Path) -> dict[str, Patch]:
    """What a checkpoint's masters change in the base: tensor name → rows or columns. Reads no weight of the base.

    A model on the meta device has the same parameter names as the one that was trained.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    tensors, _ = checkpoint.load(folder)
    with torch.device("meta"):
        sites = find_ffns(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)))
    patches = {}
    for (layer, role, axis), index in neurons.slices.items():
        name = f"{sites[layer].name}.{sites[layer].projections[role]}"
        kind = "rows" if axis == "row" else "columns"
        patches[f"{name}.weight"] = Patch(axis, index, tensors[f"master/{name}.{kind}"])
        if f"master/{name}.bias_rows" in tensors:
            patches[f"{name}.bias"] = Patch(axis, index, tensors[f"master/{name}.bias_rows"])
    return patches


def fingerprint_model(folder: Path) -> str:
    """Of a checkpoint's config and of every shard's name, size and header (the header lists all tensors)."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for shard in sorted(folder.glob("*.safetensors")):
        digest.update(f"{shard.name} {shard.stat().st_size}".encode())
        with shard.open("rb") as file:
            digest.update(file.read(1 << 16))
    return digest.hexdigest()[:16]


def be_deterministic() -> None:
    """Deterministic kernels everywhere: torch's, cuBLAS's (a fixed workspace) and flash-attn's backward."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
    torch.use_deterministic_algorithms(True)


def _lasting(config: RunConfig) -> dict[str, Any]:
    """Training settings that decide the result; how often it is logged or saved does not."""
    harmless = ("logging_steps", "report_to", "save_steps", "save_total_limit", "micro_batch_size", "loss_spike")
    return {k: v for k, v in asdict(config.train).items() if k not in harmless}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _first_rank_first(work):
    """The first rank works alone (it may download or build), then the others find what it left."""
    result = distributed.first(work)
    return result if distributed.rank() == 0 else work()
