"""What a plan's file may hold: every part of it has its type, and no part is misspelt.

    written = tomllib.loads(text)
    sound(written)      # or one line that names the part, its value and what it is to be

study_plan.py says what the parts mean.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from slicetune.engine.common.errors import UserError

TAKEN = ("rates", "recipes")
"""Folders of a study beside those of its jobs."""


def sound(written: Mapping[str, Any]) -> None:
    """Raises UserError for the first part that is missing, unknown, or not what it is to be."""
    _keys("", written, ("title", "about", "seeds", "parts", "jobs"), ("contrasts", "flags", "rates"))
    for name in ("title", "about"):
        _need(isinstance(written[name], str), name, written[name], "a text")
    seeds = written["seeds"]
    good = isinstance(seeds, list) and seeds and all(type(seed) is int and seed >= 0 for seed in seeds)
    _need(good and len(set(seeds)) == len(seeds), "seeds", seeds, "whole numbers in [], one or more, each once")
    contrasts = written.get("contrasts", [])
    pairs = isinstance(contrasts, list) and all(_texts(pair) and len(set(pair)) == len(pair) == 2 for pair in contrasts)
    _need(pairs, "contrasts", contrasts, 'pairs of two rows: [["caneft", "lora"], …]')
    for name, domains in _table("parts", written["parts"]).items():
        _need(_texts(domains), f"parts.{name}", domains, 'domains in []: ["it", "law"]')
    _flags("flags", written.get("flags", {}))
    if "rates" in written:
        _job("rates", written["rates"], ())
    for name, job in _table("jobs", written["jobs"]).items():
        _name(f"job {name}", name)
        _need(name not in TAKEN, "jobs", name, "another name: a study has a folder of its own that is called so")
        _job(f"jobs.{name}", job, ("after",))


def _job(where: str, job: Any, more: Collection[str]) -> None:
    _keys(where, _table(where, job), ("rows",), ("flags", *more))
    _need(isinstance(job.get("after", ""), str), f"{where}.after", job.get("after"), "the name of a job before it")
    _flags(f"{where}.flags", job.get("flags", {}))
    for label, row in _table(f"{where}.rows", job["rows"]).items():
        at = f"{where}.rows.{label}"
        _name(at, label)
        _need(isinstance(row, dict) and "recipe" in row, at, row, '{ recipe = "caneft_tiny" }, with flags behind it')
        for name in ("recipe", "rate"):
            _need(isinstance(row.get(name, ""), str), f"{at}.{name}", row.get(name), "a name")
        _flags(at, {key: value for key, value in row.items() if key not in ("recipe", "rate")}, "recipe, rate or ")


def _flags(where: str, flags: Any, other: str = "") -> None:
    """Flags have a room and a name (`train.epochs`); those of a run itself, such as seed, are given by compare."""
    _need(isinstance(flags, dict), where, flags, 'flags: "train.epochs" = 2')
    for name, value in flags.items():
        each = value if isinstance(value, list) else [value]
        _need(
            all(isinstance(one, str | int | float) for one in each), f"{where}.{name}", value, "a value, or some in []"
        )
        _need(
            "." in name or name == "deterministic",
            f"a name in {where}",
            name,
            f'{other}a flag in quotes, as a command line has it without --: "train.epochs" = 2',
        )


def _table(where: str, value: Any) -> dict[str, Any]:
    _need(isinstance(value, dict) and bool(value), where, value, f"a table with one entry or more: [{where}]")
    return value


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _name(where: str, name: str) -> None:
    """It becomes the name of a file."""
    _need(bool(re.fullmatch(r"\w[\w.+-]*", name)), where, name, "a name of letters, digits, _ . + and -")


def _keys(where: str, table: Mapping[str, Any], needed: Collection[str], more: Collection[str]) -> None:
    at = f"{where}: " if where else ""
    if missing := [name for name in needed if name not in table]:
        raise UserError(f"{at}{' '.join(missing)} is missing")
    if unknown := [name for name in table if name not in (*needed, *more)]:
        raise UserError(f"{at}{' '.join(unknown)} is no part of a study: it has {' '.join((*needed, *more))}")


def _need(good: Any, where: str, value: Any, wanted: str) -> None:
    if not good:
        raise UserError(f"{where} = {value!r}: must be {wanted}")
