"""What the two ranks of rank_pool.py do with FSDP2 shards of a sliced model and torch's checkpoints."""

from __future__ import annotations

from typing import Any

import steps
import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as checkpoints
from torch.distributed.fsdp import fully_shard

from slicetune.engine.common import distributed
from slicetune.engine.slices.optim import SparseColumnAdamW
from slicetune.engine.slices.state import local


def resume_shards(out: str, settings: dict[str, Any]) -> list[str]:
    """Save the state of FSDP2 shards with torch's checkpoints, load it into another model, train both on.

    Each rank's parameters and states that differ then, by way and name. whole.pt is the state gathered.
    """
    differing = []
    for way in ({}, {"flatten_optimizer_state_dict": True}, {"full_state_dict": True}):
        options = checkpoints.StateDictOptions(**way)
        (model, optimizer), (twin, other) = (_sharded(settings) for _ in range(2))
        steps.train(model, optimizer, range(3))
        saved = {"model": model.state_dict()}
        saved["optimizer"] = checkpoints.get_optimizer_state_dict(model, optimizer, options=options)
        if "full_state_dict" in way:
            distributed.first(lambda saved=saved: torch.save(saved["optimizer"], f"{out}/whole.pt"))
            loaded = saved
        else:
            dcp.save(saved, checkpoint_id=f"{out}/{len(way)}")
            loaded = {"model": twin.state_dict()}
            loaded["optimizer"] = checkpoints.get_optimizer_state_dict(twin, other, options=options)
            dcp.load(loaded, checkpoint_id=f"{out}/{len(way)}")
        twin.load_state_dict(loaded["model"])
        checkpoints.set_optimizer_state_dict(twin, other, loaded["optimizer"], options=options)
        for each in ((model, optimizer), (twin, other)):
            steps.train(*each, range(3, 6))
        found = [{**dict(m.named_parameters()), **_entries(o)} for m, o in ((model, optimizer), (twin, other))]
        assert found[0].keys() == found[1].keys()
        pairs = ((name, local(value), local(found[1][name])) for name, value in found[0].items())
        differing += [f"{way} {name}" for name, a, b in pairs if not torch.equal(a, b)]
    return differing


def _sharded(settings: dict[str, Any]) -> tuple[torch.nn.Module, SparseColumnAdamW]:
    """steps.sliced over two ranks; its optimizer is made anew, since FSDP2 makes parameters anew."""
    model, _ = steps.sliced()
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    return model, SparseColumnAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, **settings)


def _entries(optimizer: SparseColumnAdamW) -> dict[str, torch.Tensor]:
    return {f"{i}.{key}": value for i, entry in enumerate(optimizer.state.values()) for key, value in entry.items()}
