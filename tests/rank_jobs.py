"""What the two ranks of rank_pool.py can be asked to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import toys

from slicetune.engine import checkpoint, distributed
from slicetune.engine.ffn import attach
from slicetune.engine.training import train


def train_slices(out: str, overrides: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Train the toy's slices of toys.py; returns the last checkpoint's tensors."""
    config = toys.config(out, **overrides)
    model, neurons = toys.model(dtype=getattr(torch, config.model.dtype)), toys.neurons()
    attach(model, neurons)
    if config.model.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    examples = toys.examples(config.data.train_sentences)
    folder = train(model, config, examples, examples[:4], Path(out), pad_id=0, identity={"toy": 1})
    distributed.barrier()
    last, _ = checkpoint.newest(folder.parent)
    return checkpoint.load(last)[0]
