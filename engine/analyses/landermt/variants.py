"""A LANDeRMT run again with other k, ε, rates or seeds: its Fig. 10 and 11, and how steady the learned shares are.

    slicetune ask variants runs/landermt --k 1 2 4 8 --epsilon 0.7 0.8 0.9 0.95
    slicetune ask variants runs/learned --rates 1e-5 5e-5 --seeds 0 1 2

k and ε are varied one at a time, from the same detection; rates and seeds as a grid (a seed draws other sentences, so
it detects anew). Each variant is trained and decoded as the run was, in a folder of its own under
RUN/analyses/variants/; what is the run itself is not run again. Stopped, it goes on. Where shares are learned, a table
has each pair's beside the computed share that it began with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product
from pathlib import Path
from statistics import fmean
from typing import Any

from ...common import distributed, signals
from ...common.errors import UserError
from ...evaluation.bleu import METRICS
from ...evaluation.report.answer import Figure, Table, folder_of, write
from ...evaluation.report.charts import lines
from ...methods.landermt.routes import ROUTES, Routes
from ...run.config import RunConfig
from ...run.run import run_one
from ..source import finished, landermt_of, loss_text, read_run


@dataclass
class Arguments:
    """BLEU and chrF by k, by ε, by learning rate and seed."""

    run: str
    """A finished LANDeRMT run."""
    k: tuple[int, ...] = ()
    """Other numbers of layers; 0 is the untrained base, which the table has where the run decoded it."""
    epsilon: tuple[float, ...] = ()
    """Other shares of general units."""
    rates: tuple[float, ...] = ()
    """Learning rates."""
    seeds: tuple[int, ...] = ()
    """Seeds, each with every rate."""

    def __post_init__(self) -> None:
        if not (self.k or self.epsilon or self.rates or self.seeds):
            raise UserError("--k, --epsilon, --rates or --seeds: name what is to be varied")


Variant = tuple[str, float, int]
"""What is varied (k, epsilon, rate), its value, the seed."""


def variants(given: Arguments, config: RunConfig, rate: float) -> dict[Variant, RunConfig]:
    """Settings of every variant, the run's own among them; `rate` is what the run took."""
    run, method = Path(given.run), landermt_of(given.run)
    found: dict[Variant, RunConfig] = {}

    def add(what: str, value: float, seed: int, **changes: Any) -> None:
        same = seed == config.seed
        name = f"{what}-{value:g}" if same else f"{what}-{value:g}-seed-{seed}"
        found[what, value, seed] = replace(
            config,
            out=str(run / "analyses" / "variants" / name),
            method=replace(method, **{k: v for k, v in changes.items() if k != "rate"}),
            train=replace(config.train, learning_rate=changes.get("rate", rate), sweep=()),
            evaluate=replace(config.evaluate, base=False),
            score=replace(config.score, reuse=str(run) if same else ""),
            seed=seed,
        )

    for k in sorted({*given.k, method.k} - {0}) if given.k else ():
        add("k", k, config.seed, k=k)
    for epsilon in sorted({*given.epsilon, method.epsilon}) if given.epsilon else ():
        add("epsilon", epsilon, config.seed, epsilon=epsilon)
    if given.rates or given.seeds:
        grid = product(given.rates or (rate,), given.seeds or (config.seed,))
        for value, seed in sorted({*grid, (rate, config.seed)}):
            add("rate", value, seed, rate=value)
    return found


def is_run(variant: Variant, config: RunConfig, rate: float) -> bool:
    """Whether a variant is the run itself."""
    what, value, seed = variant
    own = {"k": config.method.k, "epsilon": config.method.epsilon, "rate": rate}
    return seed == config.seed and value == own[what]


def rows_of(found: Mapping[Variant, Mapping[str, Any]], base: Mapping[str, Any] | None) -> list[list[Any]]:
    """(what, value, seed, trained parameters, dev loss, mean BLEU, mean chrF over all that is decoded), base first."""
    rows: list[list[Any]] = []
    if base:
        rows.append(["base", None, None, 0, "", *(base["averages"]["all"][metric] for metric in METRICS)])
    for (what, value, seed), results in found.items():
        means = results["systems"][results["method"]]["averages"]["all"]
        facts = [results["trainable_parameters"], loss_text(results)]
        rows.append([what, value, seed, *facts, *(means[metric] for metric in METRICS)])
    return rows


def share_rows(variant: Variant, folder: Path) -> list[list[Any]]:
    """(what, value, seed, pair, layer, share of the general units as computed, as learned) by pair and routed layer.

    `folder` is the variant's run; without learned shares there are none. Raises UserError where its routes are missing.
    """
    start = Routes.load(folder / ROUTES)
    if start.car != "learned":
        return []
    learned = Routes.load(folder / "model" / ROUTES)
    return [
        [*variant, pair, layer, float(start.share[row, position]), float(learned.share[row, position])]
        for row, pair in enumerate(start.pairs)
        for position, layer in enumerate(start.layers)
        if start.takes[row, position]
    ]


def mean_shares(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Rows of `share_rows` as (what, value, seed, pair, computed, learned, change), means over the pair's layers."""
    found = []
    for key, layers in groupby(rows, key=lambda row: row[:4]):
        computed, learned = (fmean(column) for column in list(zip(*layers, strict=True))[5:])
        found.append([*key, computed, learned, learned - computed])
    return found


def answer(given: Arguments) -> None:
    """Writes variants.html and its tables."""
    signals.install()
    distributed.start()
    config, done = read_run(given.run), finished(Path(given.run))
    distributed.first_rank_first(lambda: folder_of(given.run))
    wanted = variants(given, config, done["learning_rate"])
    own = [variant for variant in wanted if is_run(variant, config, done["learning_rate"])]
    found = {v: done if v in own else distributed.share_object(run_one(one)) for v, one in wanted.items()}
    folders = {v: Path(given.run if v in own else one.out) for v, one in wanted.items()}
    distributed.first(lambda: report(given.run, found, done["systems"].get("base"), folders))
    distributed.stop()


def report(
    run: str,
    found: Mapping[Variant, Mapping[str, Any]],
    base: Mapping[str, Any] | None,
    folders: Mapping[Variant, Path],
) -> None:
    """Scores, learned shares by pair (by layer in the CSV alone), and a picture of every setting: a curve a seed."""
    rows, figures = rows_of(found, base), []
    for what in dict.fromkeys(variant[0] for variant in found):
        for place, metric in enumerate(METRICS):
            curves: dict[str, list[tuple[float, float]]] = {}
            for row in rows:
                if row[0] == what:
                    curves.setdefault(f"seed {row[2]}", []).append((row[1], row[5 + place]))
            figures.append(Figure(f"{metric} by {what}", lines(curves, what, f"mean {metric}")))
    columns = ["varied", "value", "seed"]
    tables = [
        Table("scores", [*columns, "trained", "dev loss", *METRICS], _named(rows), "Means over all that is decoded")
    ]
    if shares := [row for variant, folder in folders.items() for row in share_rows(variant, folder)]:
        means, title = _named(mean_shares(shares)), "Shares of the general units, means over the pair's layers"
        tables += [
            Table("shares", [*columns, "pair", "computed", "learned", "change"], means, title, 4),
            Table("shares-by-layer", [*columns, "pair", "layer", "computed", "learned"], _named(shares), shown=False),
        ]
    words = "Every other setting is the run's. With one seed, tenths of a point are within what seeds make."
    write(run, "variants", "Other settings of LANDeRMT", words, tables, figures)


def _named(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Rows with the value that was varied, their second column, as it was named in the command."""
    return [[what, "" if value is None else f"{value:g}", *rest] for what, value, *rest in rows]
