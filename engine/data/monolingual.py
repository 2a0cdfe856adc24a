"""Each language's own sentences, out of parallel text: what LANDeRMT measures awareness on (Sec. 5.4).

Where the same sentence stands in all languages, awareness differs by language alone; otherwise by content too. So
sentences that every pair has, found by the language that all pairs share, are taken where there are enough of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from . import corpus
from .config import DataConfig
from .languages import languages_of

Sides = Sequence[tuple[str, str]]
"""Sentences of one direction, (source, target) each."""


@dataclass(frozen=True)
class Texts:
    """Sentences of every language, and whether those of one number mean the same."""

    sentences: dict[str, list[str]]
    note: str
    """What the user should know, in one line."""
    aligned: bool


def monolingual(parallel: Mapping[str, Sides], limit: int) -> Texts:
    """At most `limit` sentences of every language of the directions ("de-en" → its sentences), none twice."""
    tables = _tables(parallel)
    languages = languages_of(list(parallel))
    common = _common(tables)
    if common and len(common[1]) >= limit:
        pivot, sentences = common[0], common[1][:limit]
        found = {
            name: sentences if name == pivot else [tables[pivot, name][text] for text in sentences]
            for name in languages
        }
        return Texts(found, f"awareness on {limit:,} sentences that all {len(languages)} languages have", True)
    if common and len(common[1]) >= 1:
        why = f"only {len(common[1]):,} sentences of {common[0]!r} are in all pairs, of {limit:,} wanted"
    else:
        why = "no sentence is in all pairs"
    found = {name: _own(tables, name, limit) for name in languages}
    counts = ", ".join(f"{name!r} {len(texts):,}" for name, texts in found.items())
    note = f"awareness on text that is not aligned over languages ({why}): its content differs too; sentences: {counts}"
    return Texts(found, note, False)


def _tables(parallel: Mapping[str, Sides]) -> dict[tuple[str, str], dict[str, str]]:
    """(language, other) → its sentences and their translation, the first one of each; for both orders of every pair."""
    tables: dict[tuple[str, str], dict[str, str]] = {}
    for pair, sides in parallel.items():
        source, target = pair.split("-")
        for one, other in sides:
            tables.setdefault((source, target), {}).setdefault(one, other)
            tables.setdefault((target, source), {}).setdefault(other, one)
    return tables


def _common(tables: Mapping[tuple[str, str], Mapping[str, str]]) -> tuple[str, list[str]] | None:
    """The language that stands in every pair and its sentences that all pairs have; None without such a language."""
    languages = dict.fromkeys(name for name, _ in tables)
    others = {name: [table for (one, _), table in tables.items() if one == name] for name in languages}
    pivots = [name for name, own in others.items() if len(own) == len(languages) - 1]
    if not pivots:
        return None
    first, *rest = others[pivots[0]]
    return pivots[0], [text for text in first if all(text in table for table in rest)]


def _own(tables: Mapping[tuple[str, str], Mapping[str, str]], name: str, limit: int) -> list[str]:
    """Sentences of a language, one of each of its pairs in turn."""
    sides: Iterable[Iterable[str]] = [table for (one, _), table in tables.items() if one == name]
    turns = chain.from_iterable(zip_longest(*sides))
    return list(dict.fromkeys(text for text in turns if text is not None))[:limit]


def texts_of(directions: Sequence[DataConfig], limit: int, seed: int) -> Texts:
    """At most `limit` sentences of every language, out of the training text of all directions; alike on all ranks."""
    parallel: dict[str, list[tuple[str, str]]] = {}
    for data in directions:
        for domain in data.seen:
            pairs = corpus.load_domain(data, domain, "train", 0, seed)
            parallel.setdefault(data.pair, []).extend((pair.source, pair.target) for pair in pairs)
    return monolingual(parallel, limit)
