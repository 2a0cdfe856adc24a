"""Files: read with a clear error, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .errors import UserError

CONFIG_LIMIT = 100_000_000
"""Bytes of a JSON file of a model folder (large tokenizers have 30 MB)."""
LINE_BREAKS = re.compile(r"[\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]+")
"""What any reader of the file could take for the end of a line (str.splitlines' list)."""


def contents(files: Iterable[str]) -> dict[str, str]:
    """Each file's first 16 hex digits of sha256: a file that changed is a setting that changed.

    Raises UserError for a file that cannot be read.
    """
    found = {}
    for file in files:
        try:
            with open(file, "rb") as opened:
                found[file] = hashlib.file_digest(opened, "sha256").hexdigest()[:16]
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}): name a file that is there") from None
    return found


def write_atomically(path: Path, text: str) -> None:
    """The whole file or the old one, whenever the process ends."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError for anything else."""
    try:
        if path.stat().st_size > CONFIG_LIMIT:
            raise ValueError("it is larger than 100 MB")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({_first_line(error)}): download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: download it again")
    return content


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:200]}" if lines else type(error).__name__


def write_lines(path: str | os.PathLike[str], lines: Sequence[str]) -> None:
    """Write a line-aligned file: complete or not at all."""
    path = Path(path)
    assert not any(LINE_BREAKS.search(line) for line in lines), "a line break within a line"
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.unfinished")
    with open(temp, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    temp.replace(path)


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a file that `write_lines` wrote (split at line feeds alone)."""
    return Path(path).read_bytes().decode("utf-8").split("\n")[:-1]
