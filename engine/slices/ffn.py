"""The FFNs of a model: found by structure, fused, and with chosen slices to train.

`attach` is the one call that makes any Hugging Face model train a NeuronSet, in the engine or in somebody's own
Trainer, Accelerate, DDP or FSDP2 loop. fused.py has the FFN as one function.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..common.errors import UserError
from ..models.sites import find_ffns
from .fused import FusedFFN
from .linear import SliceLinear, set_submodule


def fuse(model: nn.Module, recompute: bool = False) -> list[FusedFFN]:
    """Replace every FFN by a FusedFFN, in place; weights are shared, outputs the same. Returns them in layer order."""
    fused = []
    for site in find_ffns(model):
        ffn = site.module if isinstance(site.module, FusedFFN) else FusedFFN(site, recompute)
        set_submodule(model, site.name, ffn)
        fused.append(ffn)
    return fused


def attach(model: nn.Module, neurons: Any, recompute: bool = False) -> list[nn.Parameter]:
    """Freeze `model` and make the slices of a NeuronSet trainable, in place; returns the parameters to optimise.

    Use it like PEFT's get_peft_model, with any trainer or wrapper; `slices.merge(model)` gives plain layers back.
    Raises UserError if the set was made for another model.
    """
    model.requires_grad_(False)
    fused = fuse(model, recompute)
    if len(fused) != neurons.layers:
        raise UserError(f"the neuron set is of a model of {neurons.layers} layers, this one has {len(fused)}")
    chosen: dict[tuple[int, str], dict[str, Tensor]] = {}
    for (layer, role, axis), index in neurons.slices.items():
        if len(index):
            chosen.setdefault((layer, role), {})["rows" if axis == "row" else "columns"] = index
    params: list[nn.Parameter] = []
    for (layer, role), index in sorted(chosen.items()):
        ffn = fused[layer]
        linear = ffn.projection(role)
        if linear.out_features != neurons.widths[role]:
            raise UserError(
                f"the neuron set's {role} has {neurons.widths[role]} rows, the model's {linear.out_features}"
            )
        sliced = SliceLinear(linear, **index)
        setattr(ffn, ffn.roles[role], sliced)
        params += sliced.trainable()
    return params
