"""Files: read with a clear error, written whole or not at all; folders that are made once and kept.

Kept are the embedded model and corpus and a converted Baichuan2. Of several processes the first builds, under a lock,
and says so; the others wait for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
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


def sync(path: Path) -> None:
    """Ask the disk to keep a file, or a folder's entries, before the next step relies on it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


MODE = 0o666 & ~_umask()
"""Permissions of a new file, as the user's umask has them; safetensors' writer lets nobody else read its files."""


@contextmanager
def whole_file(path: Path, by: str = "") -> Iterator[Path]:
    """A name beside `path` to write to: at the end of the block it takes the place of `path`, whole.

    After an error, or a kill, the old file is still there. `by` tells several writers of one file apart.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}{by}.unfinished")
    try:
        yield unfinished
        unfinished.chmod(MODE)
        sync(unfinished)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` to fill: at the end of the block it takes the place of `path`, whole.

    An older folder goes then, not before. A kill between the two renames leaves no folder `path`, and never half a one.
    """
    unfinished, old = path.with_name(f".{path.name}.unfinished"), path.with_name(f".{path.name}.old")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for part in (*unfinished.rglob("*"), unfinished):
            if part.is_file():
                part.chmod(MODE)
            sync(part)
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        unfinished.rename(path)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """A text file in UTF-8, whole or not at all."""
    with whole_file(path) as unfinished:
        unfinished.write_bytes(text.encode())


def write_json(path: Path, value: Any, indent: int = 1) -> None:
    """A JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=indent))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError for anything else."""
    try:
        if path.stat().st_size > CONFIG_LIMIT:
            raise ValueError("it is larger than 100 MB")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({first_line(error)}): download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: download it again")
    return content


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:200]}" if lines else type(error).__name__


def write_lines(path: str | os.PathLike[str], lines: Sequence[str]) -> None:
    """Write a line-aligned file: complete or not at all."""
    path = Path(path)
    assert not any(LINE_BREAKS.search(line) for line in lines), "a line break within a line"
    write_text(path, "".join(f"{line}\n" for line in lines))


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a file that `write_lines` wrote (split at line feeds alone)."""
    return Path(path).read_bytes().decode("utf-8").split("\n")[:-1]


def cache_dir() -> Path:
    """`$SLICETUNE_CACHE`, else `~/.cache/slicetune`."""
    return Path(os.environ.get("SLICETUNE_CACHE") or Path.home() / ".cache" / "slicetune").expanduser()


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, built in a temporary folder and renamed when it is whole.

    The lock is the kernel's, on a file beside the folder: it ends with its process, so a killed build blocks nobody.
    """
    target = cache_dir() / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = open(target.with_name(f"{name}.lock"), "w")  # noqa: SIM115
    except OSError as error:
        why = f"cache folder {target.parent}: {error.strerror}; set SLICETUNE_CACHE to one that can be written"
        raise UserError(why) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():  # another process has built it while this one waited
            return target
        for stale in target.parent.glob(f".{name}-*"):  # of a build that was killed
            shutil.rmtree(stale, ignore_errors=True)
        print(f"making {target}", file=sys.stderr, flush=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
        try:
            build(scratch / name)
            os.rename(scratch / name, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target
