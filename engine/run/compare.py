"""Several methods on the same text, in one table.

    slicetune compare recipes/{base,lora,rcn,caneft}_tiny.py --out runs/compare-tiny
    torchrun --nproc_per_node 8 -m slicetune.engine compare recipes/{base,caneft}_llama31.py --seeds 0 1 --data.dir DATA

Every recipe is run as it would be alone, a folder a recipe and seed under --out; flags that are not this command's own
go to all of them. A scoring pass is shared by the runs that would repeat it, LAPE gets as many parameters as the set of
the CANEFT above it has, and a learning rate that the first seed's sweep has chosen is kept for the others. Given again,
the command goes on where it stopped. It leaves results.json, comparison.md and report.html.
"""

from __future__ import annotations

import importlib.util
import runpy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..common import distributed
from ..common.errors import UserError
from ..common.files import write_text
from ..common.settings import fingerprint, of_stage
from ..evaluation import comparison
from ..evaluation.comparison import Row
from ..evaluation.report import comparison as comparison_report
from ..models import load
from ..models.shapes import from_config
from .cli import dry_run, parse
from .config import RunConfig
from .prompted import of_results
from .run import check, run_one
from .stages import Lock


@dataclass
class CompareConfig:
    """Several methods on the same text, in one table. Flags of the recipes may follow; they go to every one."""

    recipes: tuple[Path, ...]
    """Recipe files, in the table's order; each defines CONFIG. `base_*` is the base of the others."""
    out: Path = Path("runs/compare")
    """Everything lies under this folder, a run in <recipe>/seed-<n>."""
    seeds: tuple[int, ...] = (0,)
    """Every method is run with each; what trains nothing, with the first alone."""
    dry_run: bool = False
    """Print every recipe's dry run, and do nothing."""


@dataclass
class Entry:
    """One method of the comparison."""

    label: str
    recipe: RunConfig
    config: RunConfig


def run(own: CompareConfig, rest: Sequence[str]) -> None:
    """Compare, and print the table; `rest` are flags for every recipe."""
    entries = plan(own, rest)
    if own.dry_run:
        for entry in entries:
            dry_run(entry.config)
        return
    distributed.start()
    check_all(entries)
    compare(own, entries)
    print_result(own.out)
    distributed.stop()


def plan(own: CompareConfig, rest: Sequence[str]) -> list[Entry]:
    """The recipes with the flags that follow. Raises UserError for files that are no recipes, or the same twice."""
    if not own.seeds or len(set(own.seeds)) != len(own.seeds):
        raise UserError(f"--seeds {' '.join(map(str, own.seeds))}: name one or more, each once")
    names = [path.stem for path in own.recipes]  # a folder's name must not hang on which others are compared
    if len(set(names)) != len(names) or not names:
        raise UserError(f"recipes {' '.join(names)}: name one or more, each once")
    entries = []
    for path, label in zip(own.recipes, names, strict=True):
        recipe = load_recipe(path)
        entries.append(Entry(label, recipe, parse(recipe, rest)))
    tests = {fingerprint([(d := e.config.data).pair, d.pairs, d.domains, d.test_sentences]) for e in entries}
    if len(tests) > 1:
        raise UserError("the recipes decode different domains: set --data.pair, --data.seen and --data.unseen for all")
    return entries


def check_all(entries: Sequence[Entry]) -> None:
    """Raises UserError, naming the recipe, for one that does not suit its model: before the first starts.

    A collective; reads the models' config.json and the headers of their shards.
    """

    def check_each() -> None:
        for entry in entries:
            try:
                shape = from_config(load.config_json(load.snapshot(entry.config.model.path)))
                leader = leader_of(entry, entries)
                check(entry.config, shape, leader.config.method.bounds(shape) if leader else None)
            except UserError as error:
                raise UserError(f"{entry.label}: {error}") from None

    distributed.first(check_each)


def load_recipe(path: Path) -> RunConfig:
    """The CONFIG of a recipe file, or of the installed recipe of that name; its `main` is not run.

    Raises UserError if it is none.
    """
    installed = f"slicetune.recipes.{path}"
    if path.is_file():
        found = runpy.run_path(str(path))
    elif str(path).isidentifier() and importlib.util.find_spec(installed):
        found = vars(importlib.import_module(installed))
    else:
        raise UserError(f"{path}: no such recipe: name files such as recipes/caneft_tiny.py, or caneft_tiny alone")
    config = found.get("CONFIG")
    if not isinstance(config, RunConfig):
        raise UserError(f"{path}: defines no CONFIG: name files such as recipes/caneft_tiny.py")
    return config


def compare(own: CompareConfig, entries: Sequence[Entry]) -> list[Row]:
    """Run what is not done yet; returns the rows in the recipes' order. Every rank takes part."""
    with Lock(own.out):
        rows: dict[str, Row] = {}
        shared: dict[str, Path] = {}
        for entry in sorted(entries, key=lambda e: e.config.method.follows):
            row, leader = Row(entry.label, title(entry, entries), [], []), leader_of(entry, entries)
            rows[entry.label] = row
            for seed in own.seeds[:1] if entry.config.method.is_base else own.seeds:
                folder = folder_of(own.out, entry, seed)
                match = str(folder_of(own.out, leader, seed) / leader.config.method.chosen_file) if leader else ""
                config = settings(entry.config, folder, seed, row, shared, match)
                distributed.print0(f"\n== {entry.label}, seed {seed}")
                row.runs.append(run_one(config))
                row.folders.append(folder)
        found = [rows[entry.label] for entry in entries]
        distributed.first(lambda: write(own.out, entries[0].config, found))
        return found


def folder_of(out: Path, entry: Entry, seed: int) -> Path:
    """Where a recipe is run with a seed."""
    return out / entry.label / f"seed-{seed}"


def leader_of(entry: Entry, entries: Sequence[Entry]) -> Entry | None:
    """Whose set a method that follows is to match: the nearest leader above it in the table, else the first below.

    None where it follows nobody.
    """
    if not entry.config.method.follows:
        return None
    place = [each.label for each in entries].index(entry.label)
    above, below = ([e for e in part if e.config.method.leads] for part in (entries[:place], entries[place:]))
    return above[-1] if above else below[0] if below else None


def settings(config: RunConfig, out: Path, seed: int, row: Row, shared: dict[str, Path], match: str = "") -> RunConfig:
    """One run's: its folder and seed, the rate that the first seed's sweep took, what earlier runs have made.

    `match` is the set that a method which follows is to match.
    """
    config = replace(config, out=str(out), seed=seed)
    if not config.method.is_base:
        config = replace(config, evaluate=replace(config.evaluate, base=False))
    if row.runs and config.train.sweep:
        config = replace(config, train=replace(config.train, learning_rate=row.runs[0]["learning_rate"], sweep=()))
    if match:
        config = replace(config, method=config.method.with_as_many(match))
    if config.method.scores and not config.score.reuse:
        data = of_stage(config.data, "score"), config.data.dir, config.data.dev_sentences, config.data.max_dropped
        scored = (
            of_stage(config.score, "score"),
            config.model.path,
            config.model.dtype,
            config.model.quantize,
            config.method.routes,
        )
        key = fingerprint([seed, *data, *scored])
        if key in shared:
            config = replace(config, score=replace(config.score, reuse=str(shared[key])))
        shared.setdefault(key, out)
    return config


def title(entry: Entry, entries: Sequence[Entry]) -> str:
    """The method's title; with the recipe's name where two rows would be called the same."""
    method = entry.config.method
    same = [e.label for e in entries if e.config.method.title == method.title]
    name = dict(zip(same, differing(same), strict=True))[entry.label]
    if len(same) == 1 or name == method.kind:
        return method.title
    return name.replace("_", " ").replace(method.kind, method.title)


def differing(stems: Sequence[str]) -> list[str]:
    """File names without the ending that all share (`_tiny`), which names the model."""
    parts = [stem.split("_") for stem in stems]
    while len(parts) > 1 and all(len(p) > 1 for p in parts) and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    return ["_".join(p) for p in parts]


def write(out: Path, config: RunConfig, rows: Sequence[Row]) -> None:
    significance = comparison.p_values(rows, config.data.target, config.evaluate.smooth)
    tables = comparison.tables(rows, significance)
    seeds = max(len(row.runs) for row in rows)
    about = "\n\n".join([what(config, seeds), *new_prompt(rows)])
    write_text(out / "results.json", comparison.as_json(rows, significance))
    write_text(out / "comparison.md", f"{about}\n\n{comparison_report.markdown(tables)}")
    write_text(out / "comparison.txt", f"{about}\n\n{comparison_report.terminal(tables)}\n")
    write_text(out / "report.html", comparison_report.html("Comparison", about, tables, rows))


def what(config: RunConfig, seeds: int) -> str:
    """What is compared, as the table's first line."""
    pairs = " ".join(config.data.pairs) or config.data.pair
    about = f"{config.model.path}, {pairs}, --data.budget {config.data.budget}, {seeds} seed(s)"
    on = "in full precision" if config.measured_on == "full" else "on it"
    return about + f"; trained on the base in {config.model.quantize}, measured {on}" * config.quantised


def new_prompt(rows: Sequence[Row]) -> list[str]:
    """The warning of a run, once, where the base does not know the prompt: the table is to be read with it."""
    known = [found for row in rows for run in row.runs if (found := of_results(run))]
    return [line for found in known if (line := found.warning())][:1]


def print_result(out: Path) -> None:
    if distributed.rank() == 0:
        print(f"\n{(out / 'comparison.txt').read_text(encoding='utf-8')}\nreport  {out / 'report.html'}", flush=True)
