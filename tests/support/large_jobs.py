"""What two ranks do with a model that they share: load it in parts, run it, train it (test_large.py and others)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import toys
from torch import Tensor, nn

from slicetune.engine.common import checkpoint, distributed, private
from slicetune.engine.common.errors import UserError
from slicetune.engine.methods.landermt import routing
from slicetune.engine.models.config import ModelConfig
from slicetune.engine.models.large.partition import gathering
from slicetune.engine.models.load import load_model
from slicetune.engine.run import prompted
from slicetune.engine.run.config import RunConfig
from slicetune.engine.run.job import Job
from slicetune.engine.run.prompted import Known, known, warned


def shared(folder: str, held: str, **loading: Any) -> nn.Module:
    return load_model(folder, ModelConfig(**loading), torch.device("cpu"), held=held)


def shared_logits(folders: list[str], held: str, ids: Tensor) -> list[tuple[Tensor, dict[str, Tensor], int]]:
    """Of each model: its logits of `ids`, its buffers, and how many weights this rank has of it."""
    found = []
    for folder in folders:
        model = shared(folder, held, attention="eager")
        with gathering(model), torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        own = sum(private.part_of(p).numel() for p in model.parameters())
        found.append((logits, dict(model.named_buffers()), own))
    return found


def refused(folder: str, held: str) -> str:
    """What loading it says."""
    try:
        shared(folder, held)
    except UserError as error:
        return str(error)
    return ""


def train_shared(
    folder: str, out: str, overrides: dict[str, Any], neurons: Any = None, held: str = "partitioned"
) -> tuple[dict, dict, int]:
    """Train the model in `folder`, loaded in parts or as `held` says; the last checkpoint, its steps, what is trained.

    As rank_jobs.train_method, whose model is whole until DeepSpeed has it.
    """
    config = toys.config(out, **overrides)
    model = load_model(folder, config.model, torch.device("cpu"), held=held)
    torch.manual_seed(distributed.rank())
    neurons = neurons or (toys.units() if config.method.selects else None)
    config.method.prepare(model, neurons, seed=config.seed, groups=("de-en",) * 2)
    size = sum(private.whole_size(p) for p in model.parameters() if p.requires_grad)
    return *_trained(model, config, out, toys.examples(config.data.train_sentences)), size


def train_routed_shared(
    folder: str, out: str, overrides: dict[str, Any], units: int, how: dict[str, Any], held: str = "partitioned"
) -> dict:
    """As rank_jobs.train_routed on all groups, of the model in `folder`, loaded as above; the last checkpoint."""
    config = toys.config(out, **overrides)
    model = load_model(folder, config.model, torch.device("cpu"), held=held)
    routes = toys.routes(units, **how.get("routes", {}))
    routing.attach(model, routes, routes.pairs, **{k: v for k, v in how.items() if k != "routes"})
    return _trained(model, config, out, toys.examples(config.data.train_sentences, groups=3))[0]


def prompt_losses(config: RunConfig, held: str) -> Known:
    """What a run measures of its prompt with a base that is held so."""
    job = Job(config)
    warned(job, shared(str(job.base), held, dtype="float32", attention="eager"))
    return distributed.share_object(distributed.first(lambda: known(job)))


def train_looked_at(folder: str, out: str, held: str, look: bool) -> dict[str, Tensor]:
    """Train slices of a model whose losses were measured before, or not; the last checkpoint."""
    config, model = (
        toys.config(out, zero_stage=3 if held == "partitioned" else 1),
        shared(folder, held, dtype="float32"),
    )
    if look:
        prompted._losses(model, toys.examples(6), 2, 0)
    config.method.prepare(model, toys.neurons())
    return _trained(model, config, out, toys.examples(config.data.train_sentences))[0]


def _trained(model: nn.Module, config: Any, out: str, examples: list) -> tuple[dict[str, Tensor], dict[str, int]]:
    folder = toys.trained(model, config, examples, Path(out))
    distributed.barrier()
    tensors, state = checkpoint.load(checkpoint.newest(folder.parent)[0])
    return tensors, state["group_steps"]
