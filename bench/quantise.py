"""What a quantised base costs: which neurons are chosen on it, what training on it reaches, and what memory it takes.

    python bench/quantise.py MODEL DATA --seeds 0 1 2 --data.seen it law --data.unseen news

MODEL and DATA are folders as --model.path and --data.dir take them; flags that are not listed by --help go to the runs.
A seed draws the sentences and their order; all that is compared has the same. Each kind of base has a process of its
own. It runs a small model first, so that what a process needs without a model is not counted as memory.

Of each kind and seed CANEFT scores and chooses. Then there are equal trainings: of that set, of the set that the
unquantised base chose, and, on that base and on nf4 (QLoRA), of LoRA's adapters with about as many parameters.
Next: quantise_page.py writes the page.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

from about import ROOT, provenance
from footprint import resident
from partition import SMALL, make
from quantise_page import KINDS, page
from torch import nn

from slicetune.engine.common import distributed, private
from slicetune.engine.methods.caneft import Caneft
from slicetune.engine.methods.caneft.selection import Selection, select
from slicetune.engine.methods.counts import linears, low_rank, trainable
from slicetune.engine.methods.given import Given
from slicetune.engine.methods.lora import Lora
from slicetune.engine.methods.method import Method
from slicetune.engine.models.packing import packs_long_rows
from slicetune.engine.models.quantised.layers import layers
from slicetune.engine.models.shapes import ModelShape
from slicetune.engine.run.cli import parse
from slicetune.engine.run.config import RunConfig
from slicetune.engine.run.forecast import memory, weights
from slicetune.engine.run.forecast.settle import settle
from slicetune.engine.run.job import Job
from slicetune.engine.run.run import Run, run_one
from slicetune.engine.scoring.statistics import Statistics
from slicetune.engine.slices.overlap import share
from slicetune.engine.training.diary import dev_loss
from slicetune.engine.training.metrics import peak_memory, reset_peak_memory
from slicetune.engine.training.updates import Batcher

RATIO = 0.01
FLAGS = """
    --model.dtype float32 --data.prompt short --data.score-sentences 25 --data.train-sentences 70
    --data.dev-sentences 20 --data.max-length 96 --score.tokens-per-batch 1024 --train.epochs 100 --train.max-steps 16
    --train.global-batch-size 16 --train.micro-batch-size 8 --train.learning-rate 0.001 --train.lr-scheduler linear
    --train.eval-steps 1000000 --train.save-steps 1000000 --train.report-to
""".split()  # noqa: SIM905 — as they are typed
"""float32: a CPU without instructions for bfloat16 takes 4 to 40 times longer with it. The stored numbers are the same.
The dev loss is that after the last update: a lowest one of several would be a choice by the same sentences."""
SMALL_FLAGS = """
    --data.dir tiny --data.seen it law --data.unseen koran --data.score-sentences 4 --data.train-sentences 4
    --data.dev-sentences 2 --train.max-steps 2
""".split()  # noqa: SIM905 — as they are typed


class Kind:
    """The runs on one kind of base, in this process."""

    def __init__(self, kind: str, folder: Path, flags: list[str]) -> None:
        self.kind, self.folder, self.flags = kind, folder, flags

    def config(self, name: str, seed: int, method: Method, *more: str) -> RunConfig:
        """Settings of a run that writes to `name`."""
        out = str(self.folder / f"{self.kind}-{seed}" / name)
        own = ["--model.quantize", self.kind, "--seed", str(seed), "--out", out]
        return parse(RunConfig(method=method), [*FLAGS, *self.flags, *own, *more])

    def memory(self, seed: int) -> dict[str, Any]:
        """Bytes of the weights as held in bfloat16, by part; peaks of loading them, and of the first run's stages."""
        small = ["--model.path", str(self.folder / "small"), *SMALL_FLAGS]
        run_one(self.config("small", seed, Caneft(neuron_ratio=RATIO), *small), Run.to_model)
        config = self.config("own", seed, Caneft(neuron_ratio=RATIO))
        half = Job(self.config("own", seed, Caneft(neuron_ratio=RATIO), "--model.dtype", "bfloat16"))
        private.collect()
        reset_peak_memory()
        before = peak_memory()
        model = half.model()
        peaks, parts = {"load": peak_memory() - before}, held(model)
        del model
        job = Job(config)
        base = self.dev_loss(job, job.model())
        run_one(config, Run.to_model)
        stages = json.loads((Path(config.out) / "stages.json").read_text())
        peaks |= {name: stages[name]["peak_memory_bytes"] - before for name in ("score", "train")}
        arithmetic = {"expected": expected(half.config, job.shape), "counted": counted(config, job.shape)}
        return {"weights": parts, "peaks": peaks, "base": base} | arithmetic

    def trained(self, seed: int, shape: ModelShape) -> dict[str, Any]:
        """By what was trained: its parameters, dev loss beside this base, and of the export in full precision."""
        methods: dict[str, Method] = {"own": Caneft(neuron_ratio=RATIO)}
        if self.kind in ("none", "nf4"):
            methods["lora"] = peer(shape)
        if self.kind != "none":
            methods["base's"] = Given(files=(str(self.folder / f"none-{seed}" / "own" / "neurons.safetensors"),))
        return {name: self._one(name, seed, method) for name, method in methods.items()}

    def _one(self, name: str, seed: int, method: Method) -> dict[str, Any]:
        config = self.config(name, seed, method)
        run_one(config, Run.to_model)
        out, job = Path(config.out), Job(config)
        chosen = json.loads((out / "chosen.json").read_text())
        (beside,) = chosen["dev_loss"].values()
        found = {"parameters": chosen["trainable_parameters"], "trained": beside}
        found["export"] = self.dev_loss(job, job.model(out / "model"))
        for part in ("model", "delta", "checkpoints"):
            shutil.rmtree(out / part, ignore_errors=True)
        return found

    @staticmethod
    def dev_loss(job: Job, model: nn.Module) -> float:
        """Nats a target token on the dev sentences, which are the same for every seed."""
        examples = job.examples("dev", job.config.data.dev_sentences)
        return dev_loss(model, Batcher(packs_long_rows(model), job.pad_id), examples)


def peer(shape: ModelShape) -> Lora:
    """LoRA beside all linear layers of the blocks, of the rank whose parameters come nearest to the slices'."""
    wanted, one = trainable(shape, RATIO).expectation, low_rank(shape, 1, linears(shape))
    rank = max(1, round(wanted / one))
    return Lora(rank=rank, alpha=2.0 * rank)


def held(model: nn.Module) -> dict[str, int]:
    """Bytes of a model's weights: of the quantised ones, of what their numbers are read with, of all others."""
    numbers, scales = [], []
    for _, layer in layers(model):
        numbers.append(layer.weight.data)
        state = getattr(layer.weight, "quant_state", None)
        row = [getattr(of, "SCB", None) for of in (layer.weight, getattr(layer, "state", None))]
        inner = [vars(of) for of in (state, getattr(state, "state2", None)) if of is not None]
        scales += [*inner, *(each for each in row if each is not None), getattr(layer, "scale_bits", ())]
    whole = resident(list(model.parameters()), list(model.buffers()), scales)
    quantised, read = resident(numbers), resident(scales)
    return {"quantised": quantised, "scales": read, "others": whole - quantised - read}


def expected(config: RunConfig, shape: ModelShape) -> int:
    """Bytes of the weights by the dry run's arithmetic."""
    return sum(part.bytes for part in weights.held(config, shape))


def counted(config: RunConfig, shape: ModelShape) -> dict[str, int]:
    """Bytes of a stage by the dry run's arithmetic; on a CPU what it would keep on the host counts too."""
    settled = settle(config, shape, 1, None)
    parts = {
        "score": memory.scoring(settled.scoring.config, shape),
        "train": memory.trained(settled.training.config, shape, 1, config.method.bounds(shape)),
    }
    return {name: sum(part.bytes for part in own) for name, own in parts.items()}


def compare(folder: Path, seeds: list[int]) -> dict[str, Any]:
    """By kind and seed: the share of the unquantised base's set that is chosen too, and rank correlations with its
    scores; as `draws` the same of two seeds of the unquantised base: what other sentences change.
    """
    base = {seed: _selection(folder, "none", seed) for seed in seeds}
    found = {k: {s: _alike(base[s], _selection(folder, k, s)) for s in seeds} for k in KINDS[1:]}
    return found | {"draws": {f"{a} {b}": _alike(base[a], base[b]) for a, b in combinations(seeds, 2)}}


def _selection(folder: Path, kind: str, seed: int) -> Selection:
    statistics = Statistics.load(folder / f"{kind}-{seed}" / "own" / "statistics.safetensors")
    return select(statistics, neuron_ratio=RATIO)


def _alike(a: Selection, b: Selection) -> dict[str, float]:
    from scipy.stats import spearmanr

    of = {"importance": (a.importance, b.importance), "consensus": (a.mi, b.mi)}
    return {"overlap": share(a.neurons, b.neurons)} | {
        name: float(spearmanr(x.numpy(), y.numpy()).statistic) for name, (x, y) in of.items()
    }


def measure(kind: str, folder: Path, seeds: list[int], flags: list[str]) -> None:
    """All runs of one kind; leaves `<kind>.json`."""
    distributed.start()
    runs = Kind(kind, folder, flags)
    found = runs.memory(seeds[0])
    shape = Job(runs.config("own", seeds[0], Caneft(neuron_ratio=RATIO))).shape
    found["runs"] = {seed: runs.trained(seed, shape) for seed in seeds}
    (folder / f"{kind}.json").write_text(json.dumps(found))
    distributed.stop()


def about(given: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """What was run, without this machine's paths."""
    config = parse(RunConfig(method=Caneft(neuron_ratio=RATIO)), [*FLAGS, *flags])
    shape, data, train = Job(config).shape, config.data, config.train
    return {
        "model": Path(given.model).name,
        "note": given.note,
        "parameters": shape.parameters,
        "neurons": shape.neurons,
        "rank": peer(shape).rank,
        "dtype": config.model.dtype,
        "seen": data.seen,
        "sentences": {"score": data.score_sentences, "train": data.train_sentences, "dev": data.dev_sentences},
        "max_length": data.max_length,
        "updates": train.max_steps,
        "batch": train.global_batch_size,
        "rate": train.learning_rate,
        "seeds": given.seeds,
        "provenance": provenance(),
    }


def child(given: argparse.Namespace, kind: str, folder: Path, flags: list[str]) -> None:
    """One kind in a process of its own."""
    seeds = [str(seed) for seed in given.seeds]
    command = [sys.executable, "-P", __file__, given.model, given.data, "--seeds", *seeds, "--one", kind, str(folder)]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (folder / f"{kind}.log").open("w") as log:
        environment = os.environ | {"PYTHONPATH": path}
        done = subprocess.run([*command, *flags], env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        sys.exit(f"{kind}: exit code {done.returncode}\n{(folder / f'{kind}.log').read_text()[-3000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--note", default="", help="a sentence about the model, for the page")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "FOLDER"), help="one kind of base; the script calls it")
    given, flags = parser.parse_known_args()
    flags += ["--model.path", given.model, "--data.dir", given.data]
    if given.one:
        measure(given.one[0], Path(given.one[1]), given.seeds, flags)
        return
    found = about(given, flags) | {"kinds": {}}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / "small", SMALL)
        for kind in KINDS:
            child(given, kind, Path(folder), flags)
            found["kinds"][kind] = json.loads((Path(folder) / f"{kind}.json").read_text())
            print(kind, json.dumps(found["kinds"][kind]), flush=True)
        found["alike"] = compare(Path(folder), given.seeds)
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "quantise.json"
    models = json.loads(file.read_text()) if file.is_file() else {}
    models[found["model"]] = json.loads(json.dumps(found))
    file.write_text(json.dumps(models, indent=1) + "\n")
    (given.out / "quantise.md").write_text(page(models))
    print(page(models))


if __name__ == "__main__":
    main()
