"""Where a run's neurons lie and how much they know: heat maps by layer and index, a histogram of their information.

    slicetune ask chosen runs/caneft

CANEFT's Fig. 3: layer by 15 equal parts of each projection. The histogram is of all neurons, the chosen ones marked.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..evaluation.report import sections
from ..evaluation.report.answer import Figure, Table, write
from ..evaluation.report.charts import histogram
from ..methods.caneft.information import mutual_information
from ..methods.caneft.settings import Caneft
from ..run.config import read_run
from ..scoring.statistics import Statistics
from ..slices.neurons import NeuronSet

BARS = 60


@dataclass
class Arguments:
    """Heat maps of a run's neurons and a histogram of the mutual information of all."""

    run: str
    """A run that chose neurons; the histogram needs its statistics."""


def map_rows(neurons: NeuronSet) -> list[list[int | str]]:
    """(projection, axis, layer, part, chosen): the heat maps' cells."""
    rows: list[list[int | str]] = []
    for projection, axis in neurons.counts():
        for layer, counts in enumerate(sections.bin_counts(neurons, projection, axis)):
            rows += [[projection, axis, layer, part, n] for part, n in enumerate(counts)]
    return rows


def bars(values: Tensor, chosen: Tensor, count: int = BARS) -> tuple[list[int], list[int], list[float]]:
    """Histograms of all `values` [N] and of those at `chosen` (flat numbers) over the same `count` bins, and the edges.

    Bins are half open but the last, which holds the highest value too.
    """
    low, high = float(values.min()), float(values.max())
    edges = torch.linspace(low, high if high > low else low + 1.0, count + 1, dtype=torch.float64)
    place = torch.bucketize(values.double(), edges[1:-1], right=True)
    all_counts = torch.bincount(place, minlength=count).tolist()
    return all_counts, torch.bincount(place[chosen], minlength=count).tolist(), edges.tolist()


def information(run: Path) -> tuple[Tensor, str]:
    """Eq. 9–10's information of every neuron, nats [N] in flat order, and by which consensus."""
    method = read_run(run).method
    method = method if isinstance(method, Caneft) else Caneft()
    kind = method.consensus or "specific"
    return mutual_information(Statistics.load(run / "statistics.safetensors"), method.bins, method.binning, kind), kind


def by_projection(values: Tensor, neurons: NeuronSet) -> list[list[str | int | float | None]]:
    """(projection, neurons, chosen, median of all, median of the chosen), and all projections together."""
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[neurons.flat()] = True
    widths = list(neurons.widths.values())
    names = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths)).repeat(neurons.layers)
    rows = []
    for i, name in enumerate((*neurons.widths, "all")):
        mine = names == i if i < len(widths) else torch.ones_like(chosen)
        kept = values[mine & chosen]
        median = float(kept.median()) if len(kept) else None
        rows.append([name, int(mine.sum()), len(kept), float(values[mine].median()), median])
    return rows


def answer(given: Arguments) -> None:
    """Writes chosen.html and its tables."""
    run = Path(given.run)
    neurons = NeuronSet.load(run / "neurons.safetensors")
    maps = sections.neurons(sections.Artefacts(run, {}, {}, [], neurons))
    cells = Table("map", ["projection", "axis", "layer", "part", "chosen"], map_rows(neurons), shown=False)
    tables, figures = [cells], [Figure("By layer and index", maps)]
    words = f"{neurons.count:,} chosen slices of {neurons.layers} layers. "
    if (run / "statistics.safetensors").is_file():
        values, kind = information(run)
        counts, marked, edges = bars(values, neurons.flat())
        ranked = neurons.provenance.get("method") == "caneft" and neurons.provenance["options"]["consensus"] == kind
        gamma = neurons.provenance["gamma"] if ranked else None
        figure = histogram(counts, marked, edges, f"information, nats ({kind})", gamma)
        caption = "All neurons pale, the chosen ones in full colour. Left of γ lie none of those that were chosen."
        figures.append(Figure("Mutual information of score and domain", figure, caption if gamma else ""))
        columns = ["projection", "neurons", "chosen", "median, nats", "median of the chosen"]
        tables.append(Table("projections", columns, by_projection(values, neurons), "Information", 4))
        rows = [list(row) for row in zip(edges, edges[1:], counts, marked, strict=False)]
        tables.append(Table("histogram", ["from", "to", "neurons", "chosen"], rows, shown=False))
        words += f"Information by the consensus {kind}, of {len(values):,} neurons."
    write(run, "chosen", "Chosen neurons", words, tables, figures)
