"""A LANDeRMT run again with other k, ε, rates or seeds: its Fig. 10 and 11, and how steady the learned shares are.

    python -m slicetune.engine.analyses.variants runs/landermt --k 1 2 4 8 --epsilon 0.7 0.8 0.9 0.95
    python -m slicetune.engine.analyses.variants runs/learned --rates 1e-5 5e-5 --seeds 0 1 2

k and ε are varied one at a time, from the same detection; rates and seeds as a grid (a seed draws other sentences, so
it detects anew). Each variant is trained and decoded as the run was, in a folder of its own under
RUN/analyses/variants/; what is the run itself is not run again. Stopped, it goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import tyro

from .. import distributed, signals
from ..cli import one_line
from ..config import RunConfig
from ..errors import UserError
from ..evaluation import METRICS
from ..run import run_one
from .awareness import landermt_of
from .charts import lines
from .output import Figure, Table, folder_of, write
from .ratios import finished
from .source import read_config


@dataclass
class Arguments:
    """BLEU and chrF by k, by ε, by learning rate and seed."""

    run: tyro.conf.Positional[str]
    """A finished LANDeRMT run."""
    k: tuple[int, ...] = ()
    """Other numbers of layers; 0 is the untrained base, which the table has anyway."""
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
    """Settings of every variant, the run's own among them where its value is named; `rate` is what the run took."""
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

    for k in sorted(set(given.k) - {0}):
        add("k", k, config.seed, k=k)
    for epsilon in sorted(set(given.epsilon)):
        add("epsilon", epsilon, config.seed, epsilon=epsilon)
    rates, seeds = sorted(set(given.rates)) or [rate], sorted(set(given.seeds)) or [config.seed]
    if given.rates or given.seeds:
        for value, seed in product(rates, seeds):
            add("rate", value, seed, rate=value)
    return found


def is_run(variant: Variant, config: RunConfig, rate: float) -> bool:
    """Whether a variant is the run itself."""
    what, value, seed = variant
    own = {"k": config.method.k, "epsilon": config.method.epsilon, "rate": rate}
    return seed == config.seed and value == own[what]


def rows_of(found: Mapping[Variant, Mapping[str, Any]], base: Mapping[str, Any] | None) -> list[list[Any]]:
    """(what, value, seed, trained parameters, mean BLEU, mean chrF over directions or domains), the base first."""
    rows: list[list[Any]] = []
    if base:
        rows.append(["base", None, None, 0, *(base["averages"]["all"][metric] for metric in METRICS)])
    for (what, value, seed), results in found.items():
        means = results["systems"][results["method"]]["averages"]["all"]
        rows.append([what, value, seed, results["trainable_parameters"], *(means[metric] for metric in METRICS)])
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Writes variants.html and its tables. A user's mistake is one line and exit code 2."""
    signals.install()
    with one_line():
        given = tyro.cli(Arguments, args=arguments, prog="python -m slicetune.engine.analyses.variants")
        distributed.start()
        config, done = read_config(given.run), finished(Path(given.run))
        distributed.first_rank_first(lambda: folder_of(given.run))
        wanted = variants(given, config, done["learning_rate"])
        found = {
            variant: done if is_run(variant, config, done["learning_rate"]) else distributed.share_object(run_one(one))
            for variant, one in wanted.items()
        }
        distributed.first(lambda: report(given.run, found, done["systems"].get("base")))
        distributed.stop()


def report(run: str, found: Mapping[Variant, Mapping[str, Any]], base: Mapping[str, Any] | None) -> None:
    """One table, and a picture of every setting that was varied: a curve a seed."""
    rows, figures = rows_of(found, base), []
    for what in dict.fromkeys(variant[0] for variant in found):
        for place, metric in enumerate(METRICS):
            curves: dict[str, list[tuple[float, float]]] = {}
            for row in rows:
                if row[0] == what:
                    curves.setdefault(f"seed {row[2]}", []).append((row[1], row[4 + place]))
            figures.append(Figure(f"{metric} by {what}", lines(curves, what, f"mean {metric}")))
    named = [[what, "" if value is None else f"{value:g}", *rest] for what, value, *rest in rows]
    tables = [
        Table("scores", ["varied", "value", "seed", "trained", *METRICS], named, "Means over all that is decoded")
    ]
    words = "Every other setting is the run's. With one seed, tenths of a point are within what seeds make."
    write(run, "variants", "Other settings of LANDeRMT", words, tables, figures)


if __name__ == "__main__":
    main()
