"""Selects neurons from statistics that a scoring pass wrote: seconds, on a CPU, with any settings of any such method.

    python -m slicetune.engine.select runs/de-en/statistics.safetensors --out joint.safetensors --method.consensus joint
    python -m slicetune.engine.select statistics.safetensors --method lape --method.neuron-ratio 0.02
    python -m slicetune.engine.select --method given --method.files a.json b.safetensors --model MODEL

`--method` is caneft (the default), rcn, lape or given, whose files' union needs no statistics but the model's shape.
Prints how many neurons of each projection were chosen, where in the depth, and what they cost.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field

import tyro

from ..common.command import one_line
from ..common.errors import UserError
from ..models.shapes import ModelShape, resolve
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

    statistics: tyro.conf.Positional[str] = ""
    """statistics.safetensors of a scoring pass."""
    out: str = "neurons.safetensors"
    """The neuron set to write."""
    model: str = ""
    """The model's folder or hub id, where its shape is needed: for `given`."""
    seed: int = 0
    """Draws RCN's neurons."""
    method: tyro.conf.AvoidSubcommands[AnyMethod] = field(default_factory=Caneft)


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
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return neurons


def shape_of(statistics: Statistics) -> ModelShape:
    """As much of the model's shape as its FFNs tell; attention and vocabulary are not known, and not asked for."""
    *inward, outward = statistics.widths
    gated = len(inward) == 2
    sizes = (statistics.layers, statistics.widths[outward], statistics.intermediate)
    return ModelShape("the scored model", *sizes, 1, 1, 1, 1, tied=True, gated=gated, mlp_bias=not gated)


def main(arguments: list[str] | None = None) -> None:
    """Reads, selects, prints what was chosen and why, writes. A user's mistake ends in one line and exit code 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    with one_line(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        name = _take(words, "--method", "caneft")
        if name not in CHOOSING:
            raise UserError(f"--method {name}: chooses no neurons; there are {' '.join(CHOOSING)}")
        program = f"python -m slicetune.engine.select --method {name}"
        default = Arguments(method=CHOOSING[name]())
        given = tyro.cli(Arguments, default=default, args=words, prog=program, description=__doc__)
        shape = resolve(given.model) if given.model else None
        statistics = Statistics.load(given.statistics) if given.statistics else None
        neurons = select(statistics, given.method, shape, given.seed)
        neurons.save(given.out)
    print(neurons.describe())
    for warning in said:
        print(f"warning: {warning.message}")
    print(f"→ {given.out}")


def _take(words: list[str], flag: str, default: str) -> str:
    """The value of a flag that decides which others there are, taken out of the command line."""
    if flag not in words:
        return default
    place = words.index(flag)
    if place + 1 == len(words):
        raise UserError(f"{flag}: name one of {' '.join(CHOOSING)}")
    value = words[place + 1]
    del words[place : place + 2]
    return value


if __name__ == "__main__":
    main()
