"""How much the sets that different methods choose have in common.

    slicetune ask overlap runs/caneft                      # every method, from its statistics
    slicetune ask overlap runs/caneft runs/rcn runs/lape   # the sets of those runs

A neuron is shared where both have the same slice: the same row, or the same column, of the same projection. LAPE's
units train columns of `down`, CANEFT's channels rows, so they can share slices of gate and up only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..common.errors import UserError
from ..evaluation.report.answer import Figure, Table, write
from ..evaluation.report.charts import matrix
from ..methods.caneft.settings import Rcn
from ..methods.lape import Lape
from ..scoring.statistics import Statistics
from ..slices.neurons import NeuronSet
from ..slices.overlap import jaccard, share
from .source import Source, caneft_of


@dataclass
class Arguments:
    """Overlap of the sets of several runs, or of the methods that can choose from one run's statistics."""

    runs: tuple[str, ...]
    """Folders of runs, or files neurons.safetensors; one CANEFT run alone: what each method makes of its statistics."""


def every_method(run: str) -> dict[str, NeuronSet]:
    """What each method chooses from a CANEFT run's statistics, with the run's settings else."""
    source = Source(run)
    own, seed = caneft_of(source.config), source.config.seed
    methods = {kind: replace(own, consensus=kind) for kind in ("specific", "one_vs_rest", "joint")}
    methods |= {"w/o MDMTN": replace(own, task_ratio=None), "w/o MDCAN": replace(own, consensus=None)}
    methods |= {"joint, no filter": replace(own, consensus="joint", task_ratio=None)}
    methods |= {"RCN": Rcn(**vars(own)), "LAPE": Lape(neuron_ratio=own.neuron_ratio)}
    stats = Statistics.load(Path(run) / "statistics.safetensors")
    sets = {}
    for name, method in methods.items():
        try:
            sets[name], _ = method.select(stats, source.shape, seed)
        except UserError as error:
            print(f"{name} is left out: {error}", flush=True)
    return sets


def load(path: str) -> NeuronSet:
    """A run's set, or the one in a file."""
    return NeuronSet.load(Path(path) / "neurons.safetensors" if Path(path).is_dir() else path)


def tables(sets: dict[str, NeuronSet]) -> list[Table]:
    """Sizes, Jaccard index, and the share of each row's set that the column's has."""
    names = list(sets)
    jaccards = [[name, *(jaccard(sets[name], sets[other]) for other in names)] for name in names]
    shares = [[name, *(share(sets[name], sets[other]) for other in names)] for name in names]
    sizes = [[name, chosen.count, chosen.parameters()] for name, chosen in sets.items()]
    return [
        Table("sizes", ["set", "slices", "weights"], sizes, "The sets"),
        Table("jaccard", ["", *names], jaccards, "Jaccard index", 3),
        Table("share", ["", *names], shares, "Of the row's set, what the column's has too", 3),
    ]


def answer(given: Arguments) -> None:
    """Writes overlap.html and its tables beside the first run."""
    runs = given.runs
    if not runs:
        raise UserError("name one run, or several")
    sets = every_method(runs[0]) if len(runs) == 1 else {_name(run): load(run) for run in runs}
    if len(sets) < 2:
        raise UserError(f"{' '.join(runs)}: a set to compare with is missing, or two have the same name")
    words = "1 is the same set. Sets drawn at random share about the part of all neurons that they take."
    found = tables(sets)
    figures = [Figure(table.title, _picture(table)) for table in found[1:]]
    first = Path(runs[0])
    write(first if first.is_dir() else first.parent, "overlap", "Overlap of sets", words, found, figures)


def _picture(table: Table) -> str:
    return matrix([row[1:] for row in table.rows], [row[0] for row in table.rows])


def _name(path: str) -> str:
    return Path(path).name if Path(path).is_dir() else Path(path).stem
