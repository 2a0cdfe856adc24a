"""Domains of parallel text: whether they are sound, and which sentences a run takes.

layouts.py finds a split's files or its data set and records.py reads them; prompts.py words the pairs, tokenizer/ makes
ids of them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field, replace

from ..common.errors import UserError
from . import layouts
from .config import DataConfig
from .draws import shuffled
from .records import Faults, Pair

SPLITS = ("train", "dev", "test")


@dataclass
class Split:
    """What `check` found in one split of one domain."""

    domain: str
    """Its name in the run: `<pair>/<domain>` where there are several directions."""
    name: str
    sentences: int
    faults: Faults
    fingerprint: str


@dataclass
class Leak:
    """Sentences of a dev or test split that training data hold too."""

    domain: str
    split: str
    sentences: int
    source: int
    """How many have a source sentence that is, character for character, in a seen domain's train split."""
    both: int
    """How many of those have the same translation there too."""


@dataclass
class CorpusReport:
    """What was read, dropped and found; printable."""

    where: str
    pair: str
    """Where there are several, all of them."""
    splits: list[Split] = field(default_factory=list)
    leaks: list[Leak] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seen: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """16 hex digits over all that can change the trained model: train and dev text of the seen domains."""
        parts = [
            f"{s.domain}/{s.name}={s.fingerprint}" for s in self.splits if s.domain in self.seen and s.name != "test"
        ]
        return hashlib.sha256("\n".join([self.pair, *sorted(parts)]).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        found = {(s.domain, s.name): s for s in self.splits}
        domains = list(dict.fromkeys(s.domain for s in self.splits))
        width = max([len("domain"), *map(len, domains)])
        rows = [f"corpus {self.where}, {self.pair}, fingerprint {self.fingerprint}"]
        rows.append(f"  {'domain':<{width}}" + "".join(f"{name:>10}" for name in SPLITS))
        for domain in domains:
            cells = [found.get((domain, name)) for name in SPLITS]
            rows.append(f"  {domain:<{width}}" + "".join(f"{cell.sentences if cell else '-':>10}" for cell in cells))
        for s in self.splits:
            for verb, counts in (("dropped", s.faults.dropped), ("repaired", s.faults.repaired)):
                if counts:
                    rows.append(f"  {s.domain}/{s.name}: {verb} {s.faults.describe(counts)}, of {s.faults.records}")
        for leak in self.leaks:
            rows.append(
                f"  {leak.domain}/{leak.split}: leakage: {leak.source} of {leak.sentences} source sentences are in the "
                f"training data too, {leak.both} of them with the same translation"
            )
        return "\n".join([*rows, *(f"  {note}" for note in self.notes)])


def load_domain(data: DataConfig, domain: str, split: str, limit: int = 0, seed: int = 0) -> list[Pair]:
    """Sound sentence pairs of one split; at most `limit` if that is not 0.

    Train pairs come in an order drawn with `seed`, so a smaller limit gives a prefix of what a larger one gives (CANEFT
    trains on 2k of the 10k that it scores); a direction and its reverse draw alike. Dev and test pairs come in the
    file's order. Raises UserError if the split is missing, empty, or more than `data.max_dropped` of it is broken.
    """
    pairs, _ = _read(data, domain, split)
    if split == "train":
        by_index = {pair.index: pair for pair in pairs}
        pairs = [by_index[i] for i in shuffled(by_index, "train", seed, domain)]
    return pairs[:limit] if limit else pairs


def directions(data: DataConfig) -> list[DataConfig]:
    """The settings of each direction of a run, `pair` naming it: what all other functions of this module take.

    With --data.pairs a direction has those seen domains of which the corpus has every split that a run needs, and
    those unseen ones that have a test split. Raises UserError for a domain that no direction has, and for a direction
    without a seen domain.
    """
    if not data.pairs:
        return [data]
    found = {}
    for pair in data.pairs:
        one = replace(data, pair=pair)
        found[pair] = [d for d in data.domains if all(layouts.has(one, d, split) for split in _needed(data, d))]
    for domain in data.domains:
        if not any(domain in domains for domains in found.values()):
            splits = " and ".join(_needed(data, domain))
            raise UserError(f"--data.dir {data.dir}: no direction of --data.pairs has {domain!r} ({splits} split)")
    if bare := [pair for pair, domains in found.items() if not set(domains) & set(data.seen)]:
        raise UserError(f"--data.pairs {' '.join(bare)}: {data.dir} has no domain of --data.seen in that direction")
    return [
        replace(
            data,
            pair=pair,
            seen=tuple(d for d in data.seen if d in domains),
            unseen=tuple(d for d in data.unseen if d in domains),
        )
        for pair, domains in found.items()
    ]


def check(data: DataConfig) -> CorpusReport:
    """Read everything that a run will need, before any weight is loaded: faults, leakage, shortages.

    Needed are train (and dev, if dev_sentences is not 0) of the seen domains and test of all. Raises UserError for what
    `load_domain` and `directions` do.
    """
    report = CorpusReport(where=data.dir, pair=" ".join(data.pairs) or data.pair)
    scored: Counter[str] = Counter()  # by group
    for one in directions(data):
        report.seen += tuple(one.name(domain) for domain in one.seen)
        _check(report, one, scored)
        if left_out := [domain for domain in data.domains if domain not in one.domains]:
            report.notes.append(
                f"{one.pair} goes without {' '.join(map(repr, left_out))}: the corpus lacks a split of each"
            )
    short = [s for s in report.splits if s.name == "train" and s.sentences < data.score_sentences]
    for few in [short] if data.pairs and short else [[s] for s in short]:  # many directions share a line
        has = ", ".join(f"{s.domain}/train has {s.sentences} sentences" for s in few)
        report.notes.append(f"{has}, fewer than --data.score-sentences {data.score_sentences}")
    if data.test_split == "dev" and data.dev_sentences and not data.test_dir:
        report.notes.append("measured on the dev split, which chooses the checkpoint too: scores are a little high")
    if len(set(scored.values())) > 1:
        kind, counts = "direction" if data.pairs else "domain", ", ".join(f"{g!r} {n}" for g, n in scored.items())
        report.notes.append(f"scored sentences ({counts}): a {kind} with fewer weighs less in the mutual information")
    return report


def _check(report: CorpusReport, data: DataConfig, scored: Counter[str]) -> None:
    """Add what is found of one direction to the report, and its sentences to score to `scored`."""
    trained: dict[str, set[str]] = {}  # source → its translations, over all seen domains
    for domain in data.seen:
        pairs = _add(report, data, domain, "train")
        scored[data.pair if data.pairs else domain] += min(len(pairs), data.score_sentences)
        for pair in pairs:
            trained.setdefault(pair.source, set()).add(pair.target)
    for domain in data.domains:
        for split in [split for split in _needed(data, domain) if split != "train"]:
            pairs = _add(report, data, domain, split)
            leaked = [pair for pair in pairs if pair.source in trained]
            if leaked:
                both = sum(pair.target in trained[pair.source] for pair in leaked)
                report.leaks.append(Leak(data.name(domain), split, len(pairs), len(leaked), both))


def _needed(data: DataConfig, domain: str) -> list[str]:
    """The splits of a domain that a run reads."""
    return ["train"] * (domain in data.seen) + ["dev"] * (domain in data.seen and data.dev_sentences > 0) + ["test"]


def _add(report: CorpusReport, data: DataConfig, domain: str, split: str) -> list[Pair]:
    pairs, faults = _read(data, domain, split)
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(f"{pair.index}\t{pair.source}\t{pair.target}\n".encode())
    report.splits.append(Split(data.name(domain), split, len(pairs), faults, digest.hexdigest()[:16]))
    return pairs


def _read(data: DataConfig, domain: str, split: str) -> tuple[list[Pair], Faults]:
    data, split = layouts.place(data, split)
    faults = Faults()
    found = layouts.read(data, domain, split, faults)
    languages = data.source, data.target
    pairs = [Pair(source, target, domain, number, languages) for number, source, target in found]
    faults.refuse_beyond(data.max_dropped)
    if not pairs:
        raise UserError(
            f"{data.dir}: the {split} split of {domain!r} has no sentence: fill the file, or leave the domain out"
        )
    return pairs, faults
