"""Selects neurons from statistics that a scoring pass wrote: seconds, on a CPU, with any settings of any such method.

    slicetune select runs/de-en/statistics.safetensors --out joint.safetensors --method.consensus joint
    slicetune select statistics.safetensors --method lape --method.neuron-ratio 0.02
    slicetune select --method given --method.files a.json b.safetensors --model MODEL

`--method` is caneft (the default), rcn, lape or given, whose files' union needs no statistics but the model's shape.
Prints how many neurons of each projection were chosen, where in the depth, and what they cost.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from ..common import __version__
from ..common.errors import UserError
from ..models.shapes import ModelShape
from ..scoring.statistics import Statistics
from ..slices.neurons import NeuronSet
from .caneft.settings import Caneft
from .kinds import METHODS, AnyMethod
from .method import Method

CHOOSING = {name: kind for name, kind in METHODS.items() if kind.selects}
"""Methods that choose neurons."""


@dataclass
class Arguments:
    """Select neurons from scoring statistics."""

    statistics: tuple[str, ...] = ()
    """statistics.safetensors of a scoring pass; none for `given`."""
    out: str = "neurons.safetensors"
    """The neuron set to write."""
    model: str = ""
    """The model's folder or hub id, where its shape is needed: for `given`."""
    seed: int = 0
    """Draws RCN's neurons."""
    method: AnyMethod = field(default_factory=Caneft)


def select(
    statistics: Statistics | None, method: Method | None = None, shape: ModelShape | None = None, seed: int = 0
) -> NeuronSet:
    """The neurons that `method` (CANEFT with its defaults) chooses; what the user should know is a Python warning.

    `shape` is the model's; without it that of the statistics is taken, with biases in BLOOM's FFNs and in no others.
    Raises UserError where there is nothing to choose by.
    """
    method = method or Caneft()
    if statistics is None and (method.scores or shape is None):
        what = "statistics.safetensors of a scoring pass" if method.scores else "the model, --model"
        raise UserError(f"{method.kind} needs {what}")
    neurons, notes = method.select(statistics, shape or shape_of(statistics), seed)
    neurons.provenance["slicetune"] = __version__
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return neurons


def shape_of(statistics: Statistics) -> ModelShape:
    """As much of the model's shape as its FFNs tell; attention and vocabulary are not known, and not asked for."""
    *inward, outward = statistics.widths
    gated = len(inward) == 2
    sizes = (statistics.layers, statistics.widths[outward], statistics.intermediate)
    unknown = {"heads": 1, "kv_heads": 1, "head_dim": 1, "vocab": 1, "tied": True, "linears": (), "ffn": ()}
    unknown |= {"activation": "", "block_parameters": 0, "other_parameters": 0}
    return ModelShape("the scored model", *sizes, gated=gated, mlp_bias=not gated, **unknown)
