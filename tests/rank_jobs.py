"""What the two ranks of rank_pool.py can be asked to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import toys
from torch.distributed.fsdp import fully_shard

from slicetune.engine import checkpoint, distributed
from slicetune.engine.batching import pack
from slicetune.engine.config import ScoreConfig
from slicetune.engine.ffn import attach
from slicetune.engine.models import checkpoint_activations
from slicetune.engine.optim import SparseColumnAdamW
from slicetune.engine.scoring import score
from slicetune.engine.shapes import from_config
from slicetune.engine.statistics import Statistics
from slicetune.engine.training import train


def train_slices(out: str, overrides: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Train the toy's slices of toys.py; returns the last checkpoint's tensors."""
    config = toys.config(out, **overrides)
    model, neurons = toys.model(dtype=getattr(torch, config.model.dtype)), toys.neurons()
    attach(model, neurons)
    if config.model.activation_checkpointing:
        checkpoint_activations(model)
    examples = toys.examples(config.data.train_sentences)
    folder = train(model, config, examples, examples[:4], Path(out), pad_id=0, identity={"toy": 1})
    distributed.barrier()
    last, _ = checkpoint.newest(folder.parent)
    return checkpoint.load(last)[0]


def train_method(out: str, overrides: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Prepare the toy as `overrides["method"]` says and train it; the last checkpoint, and what it began with."""
    config = toys.config(out, **overrides)
    model = toys.model(dtype=getattr(torch, config.model.dtype))
    torch.manual_seed(distributed.rank())  # what a rank did before must not matter
    config.method.prepare(model, toys.units() if config.method.selects else None, config)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    examples = toys.examples(config.data.train_sentences)
    folder = train(model, config, examples, examples[:4], Path(out), pad_id=0, identity={"toy": 1})
    distributed.barrier()
    last, _ = checkpoint.newest(folder.parent)
    return checkpoint.load(last)[0], before


def score_toys(count: int, tokens_per_batch: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Score toy sentences, each rank its share; the all-reduced histogram and sample counts."""
    model, config = toys.model(), ScoreConfig(tokens_per_batch=tokens_per_batch)
    stats = Statistics(["a", "b"], from_config(model.config), config.lowest_octave)
    score(model, toys.examples(count), stats, config, rank=distributed.rank(), world=2)
    return stats.histogram, stats.samples


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
