"""Domains of parallel text: where their files lie, whether they are sound, and which sentences a run takes.

Four layouts: `<pair>/<domain>/<split>.jsonl[.gz]`, line-aligned `<split>.<lang>[.gz]`, CANEFT's published files as
they are, and data sets of the Hugging Face hub. records.py reads the files; prompts.py makes tokens of the pairs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import records
from .batching import shuffled
from .config import DataConfig
from .errors import UserError
from .records import Faults

SPLITS = ("train", "dev", "test")
PUBLISHED = {
    "medical": "med",
    "subtitles": "sub",
    "education": "edu",
    "spoken": "spok",
    "thesis": "thes",
    "science": "sci",
    "microblog": "blog",
}
"""Domain → its short name in CANEFT's published files, where that differs."""
HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}


@dataclass
class Pair:
    """A sentence and its translation."""

    source: str
    target: str
    domain: str
    index: int
    """Number of the line (or record) in its split, from 1: with domain and split it names the pair for good."""


@dataclass
class Split:
    """What `check` found in one split of one domain."""

    domain: str
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
    trains on 2k of the 10k that it scores). Dev and test pairs come in the file's order. Raises UserError if the split
    is missing, empty, or more than `data.max_dropped` of it is broken.
    """
    pairs, _ = _read(data, domain, split)
    if split == "train":
        by_index = {pair.index: pair for pair in pairs}
        pairs = [by_index[i] for i in shuffled(by_index, "train", seed, domain)]
    return pairs[:limit] if limit else pairs


def check(data: DataConfig) -> CorpusReport:
    """Read everything that a run will need, before any weight is loaded: faults, leakage, shortages.

    Needed are train (and dev, if dev_sentences is not 0) of the seen domains and test of all. Raises UserError for what
    `load_domain` does.
    """
    report = CorpusReport(where=data.dir, pair=data.pair, seen=tuple(data.seen))
    trained: dict[str, set[str]] = {}  # source → its translations, over all seen domains
    scored: dict[str, int] = {}
    for domain in data.seen:
        pairs = _add(report, data, domain, "train")
        if len(pairs) < data.score_sentences:
            report.notes.append(
                f"{domain}/train has {len(pairs)} sentences, fewer than --data.score-sentences {data.score_sentences}"
            )
        scored[domain] = min(len(pairs), data.score_sentences)
        for pair in pairs:
            trained.setdefault(pair.source, set()).add(pair.target)
    if len(set(scored.values())) > 1:
        counts = ", ".join(f"{domain} {count}" for domain, count in scored.items())
        report.notes.append(f"scored sentences ({counts}): a domain with fewer weighs less in the mutual information")
    if data.test_split == "dev" and data.dev_sentences and not data.test_dir:
        report.notes.append("measured on the dev split, which chooses the checkpoint too: scores are a little high")
    for domain in data.domains:
        for split in ["dev"] * (domain in data.seen and data.dev_sentences > 0) + ["test"]:
            pairs = _add(report, data, domain, split)
            leaked = [pair for pair in pairs if pair.source in trained]
            if leaked:
                both = sum(pair.target in trained[pair.source] for pair in leaked)
                report.leaks.append(Leak(domain, split, len(pairs), len(leaked), both))
    return report


def _add(report: CorpusReport, data: DataConfig, domain: str, split: str) -> list[Pair]:
    pairs, faults = _read(data, domain, split)
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(f"{pair.index}\t{pair.source}\t{pair.target}\n".encode())
    report.splits.append(Split(domain, split, len(pairs), faults, digest.hexdigest()[:16]))
    return pairs


def _read(data: DataConfig, domain: str, split: str) -> tuple[list[Pair], Faults]:
    if split == "test":  # where it is and what it is called there
        split, data = data.test_split, replace(data, dir=data.test_dir or data.dir)
    languages, faults = (data.source, data.target), Faults()
    root = _root(data)
    if root is None:
        found = records.parse(_hub(data, domain, split), f"{data.dir}/{domain}/{split}", languages, languages, faults)
    else:
        paths, direction = _find(root, data, domain, split)
        if len(paths) == 2:
            found = records.aligned((paths[0], paths[1]), faults)
        else:
            found = records.json_records(paths[0], languages, direction, faults)
    pairs = [Pair(source, target, domain, number) for number, source, target in found]
    faults.refuse_beyond(data.max_dropped)
    if not pairs:
        raise UserError(f"{data.dir}: {domain}/{split} has no sentence: fill the file, or leave the domain out")
    return pairs, faults


# ---------------------------------------------------------------- where the files are


def _root(data: DataConfig) -> Path | None:
    """The corpus folder; None if --data.dir is to be looked for on the hub."""
    if data.dir == "tiny":
        from .tiny import corpus_dir

        return corpus_dir()
    root = Path(data.dir).expanduser()
    if root.is_dir():
        return root
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", data.dir):
        return None
    raise UserError(f"{_flag(data)}: no such folder")


def _flag(data: DataConfig) -> str:
    """What named the corpus that is being read (`_read` puts --data.test-dir in the place of --data.dir)."""
    return f"--data.test-dir {data.dir}" if data.dir == data.test_dir else f"--data.dir {data.dir}"


def _find(root: Path, data: DataConfig, domain: str, split: str) -> tuple[tuple[Path, ...], tuple[str, str]]:
    """The split's file, or its two line-aligned ones; and the direction of instruction records in it."""
    for paths, direction in _candidates(root, data, domain, split):
        found = [_existing(path) for path in paths]
        if all(found):
            return tuple(path for path in found if path), direction
        if any(found):
            raise UserError(
                f"{paths[found.index(None)]}: missing beside {next(filter(None, found))}: a pair needs both"
            )
    elsewhere = "" if split != "test" or data.test_dir else "; --data.test-split dev and --data.test-dir name others"
    pairs = [root / f"{a}-{b}" for a, b in _directions(data)]
    there = sorted({child.name for pair in pairs if pair.is_dir() for child in pair.iterdir() if child.is_dir()})
    names = f"domains there: {' '.join(there)}" if there else "no such folder"
    raise UserError(
        f"{_flag(data)}: no {split} split of {domain}: {data.pair}/{domain}/{split}.jsonl[.gz] or "
        f"{split}.{data.source} and {split}.{data.target} ({names}){elsewhere}"
    )


def _candidates(
    root: Path, data: DataConfig, domain: str, split: str
) -> Iterator[tuple[tuple[Path, ...], tuple[str, str]]]:
    for direction in _directions(data):
        folder = root / "-".join(direction) / domain
        for ending in ("jsonl", "json"):
            yield (folder / f"{split}.{ending}",), direction
        yield (folder / f"{split}.{data.source}", folder / f"{split}.{data.target}"), direction
    for direction in _directions(data):  # CANEFT's repository, or its data folder
        for code in dict.fromkeys((domain, PUBLISHED.get(domain, domain))):
            stem = f"{code}.{split}.{'-'.join(direction)}"
            for folder in (root, root / "data"):
                for name in (f"shuf.{stem}.jsonl", f"{stem}.jsonl", f"{stem}.instruct.json"):
                    yield (folder / name,), direction


def _directions(data: DataConfig) -> tuple[tuple[str, str], tuple[str, str]]:
    return (data.source, data.target), (data.target, data.source)


def _existing(path: Path) -> Path | None:
    return next((p for p in (path, path.with_name(path.name + ".gz")) if p.is_file()), None)


def _hub(data: DataConfig, domain: str, split: str) -> Sequence[dict]:
    """Records of a hub data set. Its configuration is named after the domain, the pair or both, or is its only one."""
    import datasets

    try:
        names = datasets.get_dataset_config_names(data.dir)
        pairs = ["-".join(direction) for direction in _directions(data)]
        wanted = [domain, *(f"{domain}-{p}" for p in pairs), *(f"{p}-{domain}" for p in pairs)]
        if len(data.domains) == 1:
            wanted += [*pairs, *names[:1]]
        name = next((name for name in wanted if name in names), None)
        if name is not None:
            return datasets.load_dataset(data.dir, name, split=HUB_SPLITS[split])
    except Exception as error:  # network, access, format: a dozen kinds, one meaning
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise UserError(
            f"--data.dir {data.dir}: no such folder, and no {split} split of {domain} from the hub "
            f"({type(error).__name__}: {reason}): offline, name a local folder"
        ) from None
    raise UserError(f"--data.dir {data.dir}: no configuration {domain} on the hub; it has {' '.join(names[:20])}")
