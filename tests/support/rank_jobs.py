"""What the two ranks of rank_pool.py can be asked to do."""

from __future__ import annotations

import json
import os
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import saved
import torch
import toys
from large_jobs import prompt_losses, refused, shared_logits, train_looked_at, train_routed_shared, train_shared  # noqa: F401
from scoring_jobs import run_together, save_on_a_full_disk, scored_until, share_toys  # noqa: F401 — jobs too
from shard_jobs import resume_shards  # noqa: F401 — a job too
from torch._dynamo.utils import counters
from torch.distributed.fsdp import fully_shard

from slicetune.engine import commands
from slicetune.engine.common import checkpoint, distributed, signals
from slicetune.engine.common.errors import Interrupted, UserError
from slicetune.engine.data.batching import pack
from slicetune.engine.data.records import Pair
from slicetune.engine.evaluation.config import EvaluateConfig
from slicetune.engine.methods.landermt import routing
from slicetune.engine.methods.landermt.detect import detect, prompt_only
from slicetune.engine.methods.landermt.detection import Detection
from slicetune.engine.models.config import ModelConfig
from slicetune.engine.models.load import checkpoint_activations
from slicetune.engine.models.shapes import from_config
from slicetune.engine.run import cli, measure, status
from slicetune.engine.run.config import RunConfig
from slicetune.engine.run.run import run_one
from slicetune.engine.run.stages import Stages
from slicetune.engine.scoring import window
from slicetune.engine.scoring.config import ScoreConfig
from slicetune.engine.scoring.passes import score
from slicetune.engine.scoring.progress import Progress
from slicetune.engine.scoring.score import score as score_labelled
from slicetune.engine.scoring.share import Share
from slicetune.engine.scoring.statistics import Statistics
from slicetune.engine.slices.ffn import attach
from slicetune.engine.slices.optim import SparseColumnAdamW
from slicetune.engine.training.plan import Plan
from slicetune.engine.training.zero import ZeroEngine

two_ranks = saved.two_ranks
plain_into_fsdp2 = saved.plain_into_fsdp2
sharded_without_values = saved.sharded_without_values


def train_slices(out: str, overrides: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Train the toy's slices of toys.py; returns the last checkpoint's tensors."""
    config = toys.config(out, **overrides)
    model, neurons = toys.model(dtype=getattr(torch, config.model.dtype)), toys.neurons()
    attach(model, neurons)
    if config.model.checkpoints:
        checkpoint_activations(model)
    examples = toys.examples(config.data.train_sentences)
    folder = toys.trained(model, config, examples, Path(out))
    distributed.barrier()
    last, _ = checkpoint.newest(folder.parent)
    return checkpoint.load(last)[0]


def train_compiled(out: str, overrides: dict[str, Any]) -> tuple[list[float], int, int]:
    """As train_slices; each update's loss, the graphs that were compiled, and how often a block was cut in two."""
    torch._dynamo.reset()
    counters.clear()
    train_slices(out, overrides)
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    return losses, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def train_method(
    out: str, overrides: dict[str, Any], toy: str = "model", neurons: Any = None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Prepare a toy as `overrides["method"]` says and train it; the last checkpoint, and what it began with.

    `toy` is the function of toys.py that makes it; `neurons` are toys.units() where none are given.
    """
    config = toys.config(out, **overrides)
    model = getattr(toys, toy)(dtype=getattr(torch, config.model.dtype))
    torch.manual_seed(distributed.rank())  # what a rank did before must not matter
    neurons = neurons or (toys.units() if config.method.selects else None)
    config.method.prepare(model, neurons, seed=config.seed, groups=("de-en",) * 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    examples = toys.examples(config.data.train_sentences)
    folder = toys.trained(model, config, examples, Path(out))
    distributed.barrier()
    last, _ = checkpoint.newest(folder.parent)
    return checkpoint.load(last)[0], before


def train_routed(
    out: str, overrides: dict[str, Any], kind: str, only: int | None, how: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Train the toy routed by `toys.routes`, on sentences of group `only` alone; the last checkpoint and its counts.

    `how`: arguments of routing.attach, and `routes`: changes to the toy routes.
    """
    config = toys.config(out, **overrides)
    model = getattr(toys, kind)(dtype=getattr(torch, config.model.dtype))
    routes = toys.routes(4 * toys.HIDDEN if kind == "bloom" else toys.INTERMEDIATE, **how.get("routes", {}))
    routing.attach(model, routes, routes.pairs, **{k: v for k, v in how.items() if k != "routes"})
    examples = toys.examples(config.data.train_sentences, groups=3)
    chosen = [e for e in examples if only is None or e.group == only]
    folder = toys.trained(model, config, chosen, Path(out))
    distributed.barrier()
    tensors, state = checkpoint.load(checkpoint.newest(folder.parent)[0])
    return tensors, state["group_steps"]


def group_timeouts(out: str) -> list[float]:
    """Seconds after which each process group gives up: ours, and those that DeepSpeed made."""
    model = toys.model()
    attach(model, toys.neurons())
    engine = ZeroEngine(model, toys.config(out).train, 1, Plan(2, 2, 1, 1, 1))
    groups = torch.distributed.distributed_c10d._world.pg_map
    found = [group._get_backend(distributed.device()).options._timeout.total_seconds() for group in groups]
    engine.close()
    return found


def score_toys(count: int, tokens_per_batch: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Score toy sentences, each rank its share; the all-reduced histogram and sample counts."""
    model, config = toys.model(), ScoreConfig(tokens_per_batch=tokens_per_batch)
    stats = Statistics(["a", "b"], from_config(model.config))
    score(model, toys.examples(count), stats, config, rank=distributed.rank(), world=2)
    return stats.histogram, stats.samples


def window_of_toys(count: int, tokens_per_batch: int) -> int:
    return window.choose(toys.model(), toys.examples(count), ScoreConfig(tokens_per_batch=tokens_per_batch))


def detect_toys(count: int, tokens_per_batch: int) -> dict[str, torch.Tensor]:
    """Detect on toy prompts and sentences, each rank its share; the all-reduced sums."""
    model, config = toys.model(), ScoreConfig(tokens_per_batch=tokens_per_batch)
    detection = Detection(("b-a", "a-b"), toys.LAYERS, toys.INTERMEDIATE, toys.HIDDEN)
    prompts = [prompt_only(example) for example in toys.examples(count)]
    sentences = [replace(example, target_start=1) for example in toys.examples(count, seed=1)]
    detect(model, prompts, sentences, detection, config, rank=distributed.rank(), world=2)
    return {name: getattr(detection, name) for name in detection.SUMS}


def score_files(model: str, files: list[str], out: str) -> dict[str, torch.Tensor]:
    """Score labelled files as the program does, in small batches."""
    stats = score_labelled(ModelConfig(path=model, dtype="float32"), files, ScoreConfig(tokens_per_batch=64), out)
    return stats.histogram | {"samples": stats.samples}


def ask_comet(out: str, python: str, model: str) -> dict[str, Any]:
    """The COMET stage of a run's folder, with the Python that it is given."""
    config = toys.config(out, data_seen=("it",), data_unseen=())
    config.evaluate = EvaluateConfig(comet=model, comet_python=python)
    pairs = [Pair("Die Anlage.", "The annex.", "it", i, ("de", "en")) for i in (1, 2)]
    return measure.comet_stage(config, ["base"], Stages(Path(out)), lambda: {"it": pairs})


def run_recipe(recipe: str, flags: list[str], cache: str) -> dict[str, Any]:
    """results.json of a recipe with flags, as its command line has them; what it converts goes to `cache`."""
    with mock.patch.dict(os.environ, SLICETUNE_CACHE=cache):
        return run_one(cli.parse(runpy.run_path(recipe)["CONFIG"], flags))


def vary_landermt(config: RunConfig) -> dict[str, Any]:
    """A LANDeRMT run, one of its first direction alone, and the commands that train or measure; results by name."""
    stop, distributed.stop = distributed.stop, lambda: None  # commands end their group, the pool keeps it
    out, pair = Path(config.out), config.data.pairs[0]
    try:
        run_one(config)
        data, score = replace(config.data, train_pairs=(pair,)), replace(config.score, reuse=config.out)
        run_one(replace(config, out=str(out / pair), data=data, score=score))
        commands.main(["ask", "variants", config.out, "--k", "1", "2"])
        commands.main(["ask", "ranges", config.out, "--sentences", "2"])
        distributed.first(lambda: commands.main(["ask", "transfer", config.out, str(out / pair)]))
    finally:
        distributed.stop = stop
    names = (".", pair, "analyses/variants/k-2")
    return {name: json.loads((out / name / "results.json").read_text()) for name in names}


def train_wrapped(wrapper: str, sentences: int, steps: int) -> dict[str, torch.Tensor]:
    """A loop of one's own around DDP or FSDP2: each rank has every other sentence; the trained rows by name."""
    model = toys.model()
    params = attach(model, toys.neurons())
    if wrapper == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
        params = [p for p in model.parameters() if p.requires_grad]
    optimizer = SparseColumnAdamW(params, lr=1e-2, weight_decay=0.1)
    examples = toys.examples(sentences)
    tokens = sum(len(e.input_ids) - e.target_start for e in examples)
    batch = pack(examples[distributed.rank() :: 2])
    for _ in range(steps):
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
        logits = wrapped(**inputs).logits[0][batch.predict]
        loss = torch.nn.functional.cross_entropy(logits, batch.target, reduction="sum")
        (2 * loss / tokens).backward()  # both wrappers average over the ranks
        optimizer.step()
        optimizer.zero_grad()
    rows = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for n, p in rows.items()}


def train_signalled(out: str, overrides: dict[str, Any], number: int, step: int) -> tuple[int, str, list[str]]:
    """Train; rank 1 gets signal `number` twice in the forward of update `step`: exit code, its line, checkpoints."""
    signals.install()
    config, model = toys.config(out, **overrides), toys.model()
    attach(model, toys.neurons())
    calls = []

    def strike(module: Any, args: Any, out: Any) -> None:
        calls.append(module.training)
        if distributed.rank() == 1 and len(calls) == step:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)

    model.model.norm.register_forward_hook(strike)
    return _ending(lambda: _train(model, config, Path(out)), Path(out))


def train_poisoned(out: str, overrides: dict[str, Any], value: float, turn: int, where: str) -> tuple[int, str, Any]:
    """Train; in the forward number `turn` rank 1's loss, or its gradient alone, is multiplied by `value`."""
    config, model = (
        toys.config(out, **overrides),
        toys.model(dtype=getattr(torch, overrides.get("model_dtype", "float32"))),
    )
    attach(model, toys.neurons())
    calls = []

    def strike(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        calls.append(module.training)
        if distributed.rank() == 1 and len(calls) == turn:
            if where == "loss":
                return out * value
            out.register_hook(lambda gradient: gradient * value)  # the loss stays finite
        return out

    model.model.norm.register_forward_hook(strike)
    return _ending(lambda: _train(model, config, Path(out)), Path(out))


def score_signalled(out: str, number: int, batch: int) -> tuple[int, str, Any]:
    """Score; rank 0 gets a signal when `batch` are done (0: no signal); this rank's share of a pass that ended."""
    signals.install()
    model, config = toys.model(), ScoreConfig(tokens_per_batch=40)
    progress = Progress(Path(out), {"toy": 1}, minutes=60.0)
    rank = distributed.rank()
    stats = Share(["a", "b"], from_config(model.config), -40, "cpu", rank, 2)
    done = progress.resume(stats)

    def after(turn: int) -> None:
        if rank == 0 and turn == batch:
            os.kill(os.getpid(), number)
        progress.after_batch(stats, turn)

    code, line, _ = _ending(
        lambda: score(model, toys.examples(40), stats, config, rank=rank, world=2, done=done, after_batch=after),
        Path(out),
    )
    return code, line, {"done": done, **stats.histogram, **stats._small()}


def _train(model: Any, config: Any, out: Path) -> None:
    examples = toys.examples(config.data.train_sentences)
    toys.trained(model, config, examples, out)


def _ending(work: Any, out: Path) -> tuple[int, str, list[str]]:
    """How `work` ended, as status.json records it, and the checkpoints it left."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        with status.recorded(out):
            work()
    except (UserError, Interrupted):
        pass
    distributed.barrier()
    signals.forget()
    ended = status.read(out)
    distributed.barrier()
    return ended["exit_code"], ended.get("message", ""), sorted(p.name for p in out.glob("checkpoints/*"))
