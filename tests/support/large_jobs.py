"""What two ranks do with a model that they share: loaded in parts, run, decoded (test_large.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import toys
from torch import nn

from slicetune.engine.common import checkpoint, distributed, private
from slicetune.engine.methods.landermt import routing
from slicetune.engine.models.config import ModelConfig
from slicetune.engine.models.large.partition import gathering
from slicetune.engine.models.load import load_model, ranks_together


def shared(folder: str, held: str) -> nn.Module:
    return load_model(folder, ModelConfig(attention="eager"), torch.device("cpu"), held=held)


def large_logits(folders: list[str], held: str, ids: torch.Tensor) -> list[tuple[torch.Tensor, dict[str, Any], int]]:
    """Of each model: its logits of `ids`, its buffers, and how many weights this rank has."""
    found = []
    for folder in folders:
        model = shared(folder, held)
        with gathering(model), torch.no_grad():
            result = model(input_ids=ids, use_cache=False).logits
        own = sum(private.part_of(p).numel() for p in model.parameters())
        found.append((result, dict(model.named_buffers()), own))
    return found


def together(folders: list[str]) -> list[int]:
    return [ranks_together(Path(folder)) for folder in folders]


def train_shared(folder: str, out: str, overrides: dict[str, Any], neurons: Any = None) -> tuple[dict, dict, list]:
    """Train the model in `folder`, partitioned when it is loaded; last checkpoint, its steps, sizes of what is trained.

    As rank_jobs.train_method, whose model is whole until DeepSpeed has it.
    """
    config = toys.config(out, **overrides)
    model = load_model(folder, config.model, torch.device("cpu"), held="partitioned")
    torch.manual_seed(distributed.rank())
    neurons = neurons or (toys.units() if config.method.selects else None)
    config.method.prepare(model, neurons, seed=config.seed, groups=("de-en",) * 2)
    sizes = [private.whole_size(p) for p in model.parameters() if p.requires_grad]
    toys.trained(model, config, toys.examples(config.data.train_sentences), Path(out))
    distributed.barrier()
    tensors, state = checkpoint.load(checkpoint.newest(Path(out) / "checkpoints")[0])
    return tensors, state["group_steps"], sizes


def train_routed_shared(folder: str, out: str, overrides: dict[str, Any], kind: str, how: dict[str, Any]) -> dict:
    """As rank_jobs.train_routed on all groups, of the model in `folder`, partitioned; the last checkpoint."""
    config = toys.config(out, **overrides)
    model = load_model(folder, config.model, torch.device("cpu"), held="partitioned")
    routes = toys.routes(4 * toys.HIDDEN if kind == "bloom" else toys.INTERMEDIATE)
    routing.attach(model, routes, routes.pairs, **how)
    toys.trained(model, config, toys.examples(config.data.train_sentences, groups=3), Path(out))
    distributed.barrier()
    return checkpoint.load(checkpoint.newest(Path(out) / "checkpoints")[0])[0]
