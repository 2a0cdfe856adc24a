"""Files of parallel text → sentence pairs, with everything that is wrong in them named and counted.

Reads bytes, so that one bad line costs one record, not the file. layouts.py finds the files.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..common.errors import UserError
from ..common.files import first_line
from .languages import strip_prefix


@dataclass
class Pair:
    """A sentence and its translation."""

    source: str
    target: str
    domain: str
    index: int
    """Number of the line (or record) in its split, from 1: with domain and split it names the pair for good."""
    languages: tuple[str, str]
    """Codes of source and target."""


LINE_LIMIT = 1_000_000
"""Bytes. A longer line is a damaged file, or a document, not a sentence."""

Record = tuple[int, str, str]
"""Line (or record) number from 1, first side, second side."""


@dataclass
class Faults:
    """What was found in one split: reason → records, and where each reason was met first (file:line)."""

    records: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def drop(self, reason: str, path: Path | str, line: int) -> None:
        self.dropped[reason] += 1
        self.first.setdefault(reason, f"{path}:{line}")

    def repair(self, reason: str, path: Path | str, line: int) -> None:
        self.repaired[reason] += 1
        self.first.setdefault(reason, f"{path}:{line}")

    def describe(self, counts: Counter[str]) -> str:
        return ", ".join(f"{count} {reason} (first: {self.first[reason]})" for reason, count in counts.most_common())

    def refuse_beyond(self, share: float) -> None:
        """Raises UserError if more than `share` of the records are broken."""
        broken = self.dropped.total()
        if broken > share * self.records:
            raise UserError(
                f"{self.describe(self.dropped)}: {broken} of {self.records} records are broken, more than "
                f"--data.max-dropped {share:g} allows: mend the file, or raise that share"
            )


class Broken(Exception):
    """Why a record cannot be used."""


def clean(text: Any, what: str) -> tuple[str, bool]:
    """The sentence without white space around it or line breaks in it, and whether it had one. Raises Broken."""
    if not isinstance(text, str):
        raise Broken(f"{what} is not text")
    text = text.strip()
    if not text:
        raise Broken("empty side")
    if "\0" in text:
        raise Broken("NUL character")
    try:
        if len(text.encode()) > LINE_LIMIT:
            raise Broken("longer than 1 MB")
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
        raise Broken("invalid Unicode") from None
    single = re.sub(r"[\r\n]+", " ", text)
    return single, single != text


def aligned(paths: tuple[Path, Path], faults: Faults) -> Iterator[Record]:
    """Pairs of two files, line by line. Raises UserError if they have different numbers of lines."""
    counts = [sum(1 for _ in _lines(path)) for path in paths]
    if counts[0] != counts[1]:
        raise UserError(
            f"{paths[0]} has {counts[0]} lines and {paths[1]} has {counts[1]}: line n must translate line n"
        )
    for (number, *first), (_, *second) in zip(_lines(paths[0]), _lines(paths[1]), strict=True):
        faults.records += 1
        broken = next(((p, reason) for p, (_, reason, _) in zip(paths, (first, second), strict=True) if reason), None)
        if broken:
            faults.drop(broken[1], broken[0], number)
            continue
        if first[2] or second[2]:
            faults.repair("CRLF line ends", paths[0] if first[2] else paths[1], number)
        yield from _keep(number, (first[0], second[0]), ("the line", "the line"), paths[0], faults)


def json_records(
    path: Path, languages: tuple[str, str], direction: tuple[str, str], faults: Faults
) -> Iterator[Record]:
    """Pairs of a JSON array or of JSON lines; `direction` is that of {"input", "output"} records.

    Raises UserError if an array is not valid JSON.
    """
    if _begins_array(path):
        yield from parse(_array(path), path, languages, direction, faults)
        return
    for number, text, reason, _ in _lines(path):
        if not reason and not text.strip():
            continue
        try:
            record = None if reason else json.loads(text)
        except (ValueError, RecursionError):
            reason = "not JSON"
        if reason:
            faults.records += 1
            faults.drop(reason, path, number)
        else:
            yield from parse([record], path, languages, direction, faults, number)


def tsv_records(path: Path, languages: tuple[str, str], direction: tuple[str, str], faults: Faults) -> Iterator[Record]:
    """Pairs of lines of two columns with a tab between; a first line of names (`source`, `de`) says which is which."""
    names: Sequence[str] = direction
    for number, text, reason, crlf in _lines(path):
        sides = text.rstrip("\r\n").split("\t")
        if number == 1 and _are_names(sides, languages):
            names = sides
            continue
        if not reason and not text.strip():
            continue
        if reason or len(sides) != len(names):
            faults.records += 1
            faults.drop(reason or f"not {len(names)} columns", path, number)
            continue
        if crlf:
            faults.repair("CRLF line ends", path, number)
        yield from parse([dict(zip(names, sides, strict=True))], path, languages, direction, faults, number)


def _are_names(columns: Sequence[str], languages: tuple[str, str]) -> bool:
    return set(languages) <= set(columns) or {"source", "target"} <= set(columns)


def csv_rows(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a csv file with a line of names. Raises UserError for a file that cannot be read.

    By Python's own reader: those of tables take `NA` for nothing and `1.50` for a number.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file)
    except (OSError, EOFError, zlib.error, ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}): fetch or write the file again") from None


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file; its columns are the keys of a JSON record. Raises UserError as `csv_rows` does."""
    import datasets

    try:
        yield from datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    except Exception as error:  # the library's, pyarrow's: a dozen kinds, one meaning
        raise UserError(f"{path}: cannot be read ({first_line(error)}): fetch or write the file again") from None


def parse(
    records: Iterable[Any],
    path: Path | str,
    languages: tuple[str, str],
    direction: tuple[str, str],
    faults: Faults,
    start: int = 1,
) -> Iterator[Record]:
    """Pairs of records as `_sides` knows them, numbered from `start`; `direction` is that of nameless sides."""
    for number, record in enumerate(records, start):
        faults.records += 1
        try:
            sides = _sides(record, languages, direction)
        except Broken as error:
            faults.drop(str(error), path, number)
            continue
        yield from _keep(number, sides, languages, path, faults)


def _keep(
    number: int, sides: tuple[Any, Any], names: tuple[str, str], path: Path | str, faults: Faults
) -> Iterator[Record]:
    try:
        (source, broke), (target, broke_too) = (clean(side, name) for side, name in zip(sides, names, strict=True))
    except Broken as error:
        faults.drop(str(error), path, number)
        return
    if broke or broke_too:
        faults.repair("line breaks inside a sentence", path, number)
    yield number, source, target


def _sides(record: Any, languages: tuple[str, str], direction: tuple[str, str]) -> tuple[Any, Any]:
    """Both sides of {"translation": {code: text}}, {code: text}, {"source", "target"} or {"input", "output"}.

    The languages' names ("German: …") are taken off the last, instruction records. Raises Broken.
    """
    if not isinstance(record, dict):
        raise Broken("not a JSON object")
    if "translation" not in record and "input" in record and "output" in record:
        sides = dict(zip(direction, (record["input"], record["output"]), strict=True))
        sides = {code: strip_prefix(text, code) if isinstance(text, str) else text for code, text in sides.items()}
    elif "translation" not in record and "source" in record and "target" in record:
        sides = dict(zip(direction, (record["source"], record["target"]), strict=True))
    elif "translation" not in record and any(code in record for code in languages):
        sides = record
    else:
        sides = record.get("translation")
        if sides is None:
            raise Broken(f'no key or column "{direction[0]}", "source" or "translation"')
        if not isinstance(sides, dict):
            raise Broken('"translation" is not an object')
    for code in languages:
        if code not in sides:
            raise Broken(f'no key "{code}"')
    return sides[languages[0]], sides[languages[1]]


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def _lines(path: Path) -> Iterator[tuple[int, str, str, bool]]:
    """(number from 1, text, why it is broken or "", whether it ended in CRLF) of every line; only LF ends a line."""
    try:
        with _open(path) as file:
            number = 0
            while raw := file.readline(LINE_LIMIT + 1):
                number += 1
                long = len(raw) > LINE_LIMIT and not raw.endswith(b"\n")
                end = raw
                while long and end and not end.endswith(b"\n"):  # read on to the line's end without keeping it
                    end = file.readline(LINE_LIMIT)
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                yield number, *_decode(raw, long)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}): fetch the file again") from None


def _decode(raw: bytes, long: bool) -> tuple[str, str, bool]:
    if long:
        return "", "longer than 1 MB", False
    try:
        return raw.decode("utf-8"), "", raw.endswith(b"\r\n")
    except UnicodeDecodeError:
        return "", "invalid UTF-8", False


def _begins_array(path: Path) -> bool:
    first = next((text for _, text, reason, _ in _lines(path) if text.strip() or reason), "")
    return first.lstrip().startswith("[") or (path.name.removesuffix(".gz").endswith(".json") and not first)


def _array(path: Path) -> list[Any]:
    try:
        with _open(path) as file:
            records = json.loads(file.read().decode("utf-8-sig"))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}): fetch the file again") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON array ({error}): mend the file") from None
    if not isinstance(records, list):
        raise UserError(f"{path}: holds one JSON {type(records).__name__}: write an array, or one record a line")
    return records
