"""Folders that are made once and kept: the embedded model and corpus, a converted Baichuan2.

Of several processes the first builds, under a lock, and says so; the others wait for it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from .errors import UserError


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
