"""How far training moved the chosen weights, against another run's: CANEFT's Fig. 4.

    slicetune ask change runs/caneft runs/rcn

The mean absolute change of the trained weights of each projection in the lower, middle and upper third of the layers,
from the runs' slice deltas. A weight that was not trained did not change and does not count.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import UserError
from ..evaluation.report.answer import Figure, Table, write
from ..evaluation.report.charts import grouped_bars
from ..export import delta
from ..models.sites import checkpoint_sites
from ..run.config import read_run
from ..slices.neurons import thirds

THIRDS = ("lower", "middle", "upper")
Place = tuple[str, str]
"""Projection, third."""


@dataclass
class Arguments:
    """Mean absolute change of the trained weights of two runs, or more, by projection and third of the layers."""

    runs: tuple[str, ...]
    """Folders of finished runs, such as one of CANEFT and one of RCN."""


def mean_changes(run: Path) -> dict[Place, tuple[float, int]]:
    """(mean |new - old|, weights) of a run's trained weights by projection and third, in the layers' order.

    Raises UserError where the run has no delta.
    """
    sites = _modules(run)
    layers = 1 + max(layer for own in sites.values() for layer, *_ in own)
    third = {layer: name for name, part in zip(THIRDS, thirds(layers), strict=True) for layer in part}
    about = delta.read_about(run / "delta")
    total: dict[Place, float] = defaultdict(float)
    count: dict[Place, int] = defaultdict(int)
    for name, axis, part in delta.slices(run / "delta"):
        for layer, projection, rows in sites[about["tensors"][name]["module"]]:
            of = slice(None)  # columns, and rows of a layer that one projection has for itself
            if axis == "row":
                of = (part["index"] >= rows.start) & (part["index"] < rows.stop)
            place, moved = (projection, third[layer]), part["new"][of].double() - part["old"][of].double()
            total[place] += float(moved.abs().sum())
            count[place] += moved.numel()
    roles = list(dict.fromkeys(role for own in sites.values() for _, role, _ in own))
    places = [(role, name) for role in roles for name in THIRDS]
    return {place: (total[place] / count[place], count[place]) for place in places if count[place]}


def _modules(run: Path) -> dict[str, list[tuple[int, str, range]]]:
    """Name of every FFN layer → its layer's number, and each projection in it with its rows, by config.json alone."""
    if not (run / "model" / "config.json").is_file() or not (run / "delta").is_dir():
        raise UserError(f"{run}: no model/ and delta/ there: name the --out of a finished run that chose neurons")
    sites = checkpoint_sites(run / "model")
    found: dict[str, list[tuple[int, str, range]]] = {}
    for site in sites:
        for role in site.projections:
            rows = range(site.first(role), site.first(role) + site.width(role))
            found.setdefault(site.child(role), []).append((site.layer, role, rows))
    return found


def names_of(runs: Sequence[str]) -> list[str]:
    """Each run's method where these differ, else its folder's name."""
    folders = [Path(run) for run in runs]
    if not all((folder / "config.json").is_file() for folder in folders):
        return [folder.name for folder in folders]
    titles = [read_run(folder).method.title for folder in folders]
    return titles if len(set(titles)) == len(titles) else [folder.name for folder in folders]


def updates(name: str, run: Path) -> str:
    """How long the exported weights were trained, and at which rate: without it a distance says little."""
    try:
        taken = json.loads((run / "chosen.json").read_text(encoding="utf-8"))
        step = Path(taken["checkpoint"]).name.removeprefix("step-")
        return f"{name} {step} at {taken['learning_rate']:g}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{name} unknown"


def answer(given: Arguments) -> None:
    """Writes change.html and its table beside the first run."""
    runs = given.runs
    names = names_of(runs)
    if len(set(names)) != len(names) or not names:
        raise UserError(f"{' '.join(runs)}: name runs of different methods, or whose folders are called differently")
    found = {name: mean_changes(Path(run)) for name, run in zip(names, runs, strict=True)}
    places = [(p, third) for p in _projections(found) for third in THIRDS]
    rows = [
        [*place, *(value for changes in found.values() for value in changes.get(place, (None, 0)))] for place in places
    ]
    columns = ["projection", "layers", *(f"{name}{what}" for name in names for what in ("", ", weights"))]
    series = {name: [changes.get(place, (0.0, 0))[0] for place in places] for name, changes in found.items()}
    picture = grouped_bars([" ".join(place) for place in places], series, "mean |change|")
    words = "Mean absolute change of the trained weights, each layer's third by itself; what is frozen is left out. "
    words += f"More updates at a higher rate go further: {', '.join(map(updates, names, map(Path, runs)))}."
    table = Table("thirds", columns, rows, "By projection and third of the layers", 7)
    write(runs[0], "change", "How far the weights moved", words, [table], [Figure(table.title, picture)])


def _projections(found: dict[str, dict[Place, tuple[float, int]]]) -> list[str]:
    return list(dict.fromkeys(projection for changes in found.values() for projection, _ in changes))
