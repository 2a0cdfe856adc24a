"""What units are worth: the loss of each direction when units of a range of awareness are silenced, or routed.

    slicetune ask ranges runs/landermt --sentences 24

The routed layers' units are ranked by Φ (the mean over the direction's two languages); a tenth of each layer at a time
is silenced (h = 0) in the base model, from the least aware to the most. Beside that: as many at random, the general
ones, the direction's own, those of other languages alone, and LANDeRMT's routing as the run has it, untrained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...common import distributed
from ...common.errors import UserError
from ...evaluation.report.answer import Figure, Table, write
from ...evaluation.report.charts import grouped_bars, lines
from ...methods.landermt.detection import SCORES, Detection
from ...methods.landermt.routes import GENERAL, ROUTES, Routes
from ...methods.landermt.routing import route
from ...models.sites import find_ffns
from ..paired import batches_of, losses
from ..source import Source, landermt_of

TENTHS = 10


@dataclass
class Arguments:
    """Loss of each direction when units are silenced by awareness; routing on and off."""

    run: str
    """A run of LANDeRMT, its select stage done."""
    sentences: int = 24
    """A domain of each direction, of the dev split."""
    seed: int = 0
    """Of the random tenth."""

    def __post_init__(self) -> None:
        if self.sentences < 1:
            raise UserError(f"--sentences {self.sentences}: must be at least 1")


Silence = dict[int, Tensor]
"""Layer → bool [I]: the units that are silenced."""


def silences(phi: Tensor, routes: Routes, pair: str, seed: int) -> dict[str, Silence]:
    """What is silenced for a direction, by name. phi [languages, layers, I]; layers are those that it routes.

    The tenths of a layer differ by one unit at most; ties are ranked by index.
    """
    row, own = routes.row(pair), routes.own()[routes.row(pair)]
    found: dict[str, Silence] = {}
    generator = torch.Generator().manual_seed(seed)
    for position, layer in enumerate(routes.layers):
        if not routes.takes[row, position]:
            continue
        owner = routes.owner[position].long()
        tenth = _tenths(phi[own, layer].mean(0).argsort(stable=True))
        mine = own[owner.clamp_min(0)] & (owner >= 0)
        masks = {f"{10 * i}-{10 * i + 10} %": tenth == i for i in range(TENTHS)}
        masks["a random tenth"] = _tenths(torch.randperm(len(owner), generator=generator)) == 0
        masks |= {"general": owner == GENERAL, "own specific": mine, "others' specific": (owner >= 0) & ~mine}
        for name, mask in masks.items():
            found.setdefault(name, {})[layer] = mask
    return found


def _tenths(order: Tensor) -> Tensor:
    """Which tenth of `order`, a permutation, each of its units is in."""
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return place * TENTHS // len(order)


@contextlib.contextmanager
def without(model: nn.Module, units: Mapping[int, Tensor]) -> Iterator[None]:
    """Inside, these units' outputs are 0. The FFNs are the model's own, not fused ones."""
    sites, handles = find_ffns(model), []
    for layer, mask in units.items():
        last = getattr(sites[layer].module, list(sites[layer].projections.values())[-1])
        off = mask.to(last.weight.device)
        hook = lambda module, inputs, off=off: (inputs[0].masked_fill(off, 0), *inputs[1:])  # noqa: E731
        handles.append(last.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measure(source: Source, found: Detection, routes: Routes, given: Arguments) -> list[list[str | int | float]]:
    """Rows (direction, what, units silenced, loss, change): the base first, then every silence, then routed.

    A collective: ranks share the directions.
    """
    examples = source.examples("dev", given.sentences)
    names = source.config.data.pairs or (source.config.data.pair,)
    groups = {p: [e for e in examples if e.group == i or len(names) == 1] for i, p in enumerate(names)}
    mine = list(groups)[distributed.rank() :: distributed.world()]
    batches = {pair: batches_of(source, groups[pair]) for pair in mine}
    model, rows = source.model(), []
    phi = found.awareness
    for pair in mine:
        base = float(losses(model, batches[pair]).mean())
        rows.append([pair, "nothing", 0, base, 0.0])
        for name, units in silences(phi, routes, pair, given.seed).items():
            with without(model, units):
                value = float(losses(model, batches[pair]).mean())
            rows.append([pair, name, sum(int(mask.sum()) for mask in units.values()), value, value - base])
    router = route(model, routes)
    for pair in mine:
        router.set([pair])
        off = sum(int((routes.gains(i)[routes.row(pair)] == 0).sum()) for i in range(len(routes.layers)))
        base = next(row[3] for row in rows if row[:2] == [pair, "nothing"])
        value = float(losses(model, batches[pair]).mean())
        rows.append([pair, "routed", off, value, value - base])
    every = [row for part in distributed.collect(rows) for row in part]
    return sorted(every, key=lambda row: names.index(row[0]))


def answer(given: Arguments) -> None:
    """Writes ranges.html and its tables."""
    distributed.start()
    landermt_of(given.run)
    found, routes = Detection.load(Path(given.run) / SCORES), Routes.load(Path(given.run) / ROUTES)
    rows = measure(Source(given.run), found, routes, given)
    distributed.first(lambda: report(given, rows))
    distributed.stop()


def report(given: Arguments, rows: list[list[str | int | float]]) -> None:
    """One table a direction down and a condition across, the CSV of all, and two pictures."""
    pairs = list(dict.fromkeys(row[0] for row in rows))
    kinds = list(dict.fromkeys(row[1] for row in rows))
    change = {(row[0], row[1]): row[4] for row in rows}
    base = {row[0]: row[3] for row in rows if row[1] == "nothing"}
    wide = [[pair, base[pair], *(change.get((pair, kind)) for kind in kinds[1:])] for pair in pairs]
    tenths = [kind for kind in kinds if kind.endswith("%")]
    curves = {p: [(10.0 * i + 5, change[p, kind]) for i, kind in enumerate(tenths)] for p in pairs}
    rest = [kind for kind in kinds[1:] if kind not in tenths]
    bars = {kind: [max(change[pair, kind], 0.0) for pair in pairs] for kind in rest}
    tables = [
        Table("changes", ["direction", "loss", *kinds[1:]], wide, "Change of the loss, nats a token", 3),
        Table("losses", ["direction", "silenced", "units", "loss", "change"], rows, shown=False),
    ]
    figures = [
        Figure("By tenth of awareness", lines(curves, "units by rank of awareness, %", "change of the loss")),
        Figure("By kind of unit, and routed", grouped_bars(pairs, bars, "change of the loss"), "Below 0 drawn as 0."),
    ]
    words = f"{given.sentences} sentences a domain and direction of the dev split; the base model, nothing is trained."
    write(given.run, "ranges", "What units are worth, by awareness", words, tables, figures)
