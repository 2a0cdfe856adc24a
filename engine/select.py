"""Selects neurons from statistics that a scoring pass wrote: seconds, on a CPU, with any settings of the method.

    python -m slicetune.engine.select runs/de-en/statistics.safetensors --out joint.safetensors --method.consensus joint

Prints how many neurons of each projection were chosen, where in the depth, and what they cost.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import tyro

from .cli import one_line
from .methods.caneft import Caneft
from .selection import select
from .statistics import Statistics


@dataclass
class Arguments:
    """Select neurons from scoring statistics."""

    statistics: tyro.conf.Positional[str]
    """statistics.safetensors of a scoring pass."""
    out: str = "neurons.safetensors"
    """The neuron set to write."""
    method: Caneft = field(default_factory=Caneft)


def main(arguments: list[str] | None = None) -> None:
    """Reads, selects, prints what was chosen and why, writes. A user's mistake ends in one line and exit code 2."""
    with one_line():
        given = tyro.cli(Arguments, args=arguments, prog="python -m slicetune.engine.select", description=__doc__)
        selection = select(Statistics.load(given.statistics), given.method)
        selection.neurons.save(given.out)
    print(selection.neurons.describe())
    for warning in selection.warnings:
        print(f"warning: {warning}")
    print(f"→ {given.out}")


if __name__ == "__main__":
    main()
