"""Where the splits of a corpus lie: four layouts.

`<pair>/<domain>/<split>.jsonl[.gz]` (or .json, .tsv, .csv, .parquet), line-aligned `<split>.<lang>[.gz]`, CANEFT's
published files as they are, and data sets of the Hugging Face hub. records.py reads what is found. Where nothing is
found the error says what lies there, and which of these it is near to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..common.errors import UserError
from . import records
from .config import DataConfig
from .records import Faults, Record
from .tiny import corpus_dir

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


def place(data: DataConfig, split: str) -> tuple[DataConfig, str]:
    """Where a split is and what it is called there: test sentences may be another corpus's, or its dev split."""
    return (replace(data, dir=data.test_dir or data.dir), data.test_split) if split == "test" else (data, split)


def has(data: DataConfig, domain: str, split: str) -> bool:
    """Whether the corpus has a split; of the hub, whether it has a configuration for the domain and direction."""
    data, split = place(data, split)
    root = _root(data)
    if root is None:
        return _hub_name(data, domain, split) is not None
    return any(any(map(_existing, paths)) for paths, _ in _candidates(root, data, domain, split))


def read(data: DataConfig, domain: str, split: str, faults: Faults) -> Iterator[Record]:
    """The sound records of a split that `place` has placed; the others are counted in `faults`.

    Raises UserError if the split is missing, half there, or not to be had from the hub.
    """
    languages, root = (data.source, data.target), _root(data)
    if root is None:
        return records.parse(_hub(data, domain, split), f"{data.dir}/{domain}/{split}", languages, languages, faults)
    paths, direction = _find(root, data, domain, split)
    if len(paths) == 2:
        return records.aligned((paths[0], paths[1]), faults)
    ending = paths[0].name.removesuffix(".gz").rpartition(".")[2]
    if ending == "tsv":
        return records.tsv_records(paths[0], languages, direction, faults)
    if ending in ("csv", "parquet"):
        rows = records.csv_rows(paths[0]) if ending == "csv" else records.parquet_rows(paths[0])
        return records.parse(rows, paths[0], languages, direction, faults)
    return records.json_records(paths[0], languages, direction, faults)


def _root(data: DataConfig) -> Path | None:
    """The corpus folder; None if --data.dir is to be looked for on the hub."""
    if data.dir == "tiny":
        return corpus_dir()
    root = Path(data.dir).expanduser()
    if root.is_dir():
        return root
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", data.dir):
        return None
    raise UserError(f"{_flag(data)}: no such folder")


def _flag(data: DataConfig) -> str:
    """What named the corpus that is being read (`place` puts --data.test-dir in the place of --data.dir)."""
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
    raise UserError(
        f"{_flag(data)}: no {split} split of {domain!r}: {data.pair}/{domain}/{split}.jsonl[.gz], .tsv, .csv or "
        f".parquet, or {split}.{data.source} and {split}.{data.target} ({_there(root, data, domain)}){elsewhere}"
    )


def _there(root: Path, data: DataConfig, domain: str) -> str:
    """What lies where a split was looked for, and what to do with it where that is known."""
    pairs = [folder for a, b in _both_ways(data) if (folder := root / f"{a}-{b}").is_dir()]
    inside = [folder for pair in pairs if (folder := pair / domain).is_dir()]
    if not pairs and (root / domain).is_dir():
        return f"no such folder, but {root / domain} is there: move the domains' folders into {root / data.pair}"
    files = sorted(p.name for folder in inside or pairs or [root] for p in folder.iterdir() if p.is_file())
    moses = re.compile(rf".*\.({'|'.join(map('-'.join, _both_ways(data)))})\.({data.source}|{data.target})(\.gz)?")
    if found := next(filter(moses.fullmatch, files), None):
        aligned = f"{data.pair}/{domain}/<split>.{data.source} and .{data.target}"
        return f"{found} there is OPUS's (Moses), without splits: cut both files into train, dev and test: {aligned}"
    if found := next((name for name in files if re.fullmatch(r"Bi-\w+\.txt", name)), None):
        aligned = f"{data.pair}/{domain}/<split>.{data.source} and .{data.target}"
        return f"{found} there is UM-Corpus's, whose lines take turns: write each language's into {aligned}"
    if pairs and not inside:
        there = sorted(child.name for pair in pairs for child in pair.iterdir() if child.is_dir())
        return f"domains there: {' '.join(map(repr, there))}" if there else f"no domain's folder in {pairs[0]}"
    if files:
        more = f" and {len(files) - 8} more" if len(files) > 8 else ""
        return f"files there: {' '.join(files[:8])}{more}"
    return "no such folder"


def _candidates(
    root: Path, data: DataConfig, domain: str, split: str
) -> Iterator[tuple[tuple[Path, ...], tuple[str, str]]]:
    for direction in _both_ways(data):
        folder = root / "-".join(direction) / domain
        for ending in ("jsonl", "json", "tsv", "csv", "parquet"):
            yield (folder / f"{split}.{ending}",), direction
        yield (folder / f"{split}-00000-of-00001.parquet",), direction  # as the hub's own tools name it
        yield (folder / f"{split}.{data.source}", folder / f"{split}.{data.target}"), direction
    for direction in _both_ways(data):  # CANEFT's repository, or its data folder
        for code in dict.fromkeys((domain, PUBLISHED.get(domain, domain))):
            stem = f"{code}.{split}.{'-'.join(direction)}"
            for folder in (root, root / "data"):
                for name in (f"shuf.{stem}.jsonl", f"{stem}.jsonl", f"{stem}.instruct.json"):
                    yield (folder / name,), direction


def _both_ways(data: DataConfig) -> tuple[tuple[str, str], tuple[str, str]]:
    """The direction and its reverse: a folder may name either."""
    return (data.source, data.target), (data.target, data.source)


def _existing(path: Path) -> Path | None:
    return next((p for p in (path, path.with_name(path.name + ".gz")) if p.is_file()), None)


def _hub(data: DataConfig, domain: str, split: str) -> Sequence[dict]:
    """Records of a hub data set."""
    import datasets

    name = _hub_name(data, domain, split)
    if name is None:
        names = " ".join(_hub_names(data, domain, split)[:20])
        raise UserError(f"--data.dir {data.dir}: no configuration {domain!r} on the hub; there are {names}")
    with _of_the_hub(data, domain, split):
        return datasets.load_dataset(data.dir, name, split=HUB_SPLITS[split])


def _hub_name(data: DataConfig, domain: str, split: str) -> str | None:
    """The configuration that is named after the domain, the direction or both, or is the only one."""
    names = _hub_names(data, domain, split)
    pairs = ["-".join(direction) for direction in _both_ways(data)]
    wanted = [domain, *(f"{domain}-{p}" for p in pairs), *(f"{p}-{domain}" for p in pairs)]
    if len(data.domains) == 1:
        wanted += [*pairs, *names[: not data.pairs or len(names) == 1]]
    return next((name for name in wanted if name in names), None)


def _hub_names(data: DataConfig, domain: str, split: str) -> list[str]:
    import datasets

    with _of_the_hub(data, domain, split):
        return datasets.get_dataset_config_names(data.dir)


@contextmanager
def _of_the_hub(data: DataConfig, domain: str, split: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # network, access, format: a dozen kinds, one meaning
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise UserError(
            f"--data.dir {data.dir}: no such folder, and no {split} split of {domain!r} from the hub "
            f"({type(error).__name__}: {reason}): offline, name a local folder"
        ) from None
