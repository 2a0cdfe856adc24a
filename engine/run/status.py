"""`status.json` in `--out`: whether a run is running, complete, interrupted or failed.

torchrun turns every exit code into 1, so a scheduler's script reads this file instead. A process that was killed
(-9) cannot write: then `state` stays "running", with the host and process that were.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..common import distributed
from ..common.errors import Exit, describe
from ..common.files import whole_file

NAME = "status.json"
STATES = {Exit.COMPLETE: "complete", Exit.FAILED: "failed", Exit.WRONG: "failed", Exit.INTERRUPTED: "interrupted"}


@contextmanager
def recorded(out: Path) -> Iterator[None]:
    """Record in `out` how the work inside ends; errors go on. Where ranks fail differently the first one's is kept."""
    if distributed.rank() == 0:
        _write(out, {"state": "running"})
    distributed.barrier()
    try:
        yield
    except BaseException as error:
        code, message = describe(error)
        first = distributed.rank() == 0
        if first if getattr(error, "agreed", False) else read(out).get("state") == "running":
            _write(out, {"state": STATES[code], "exit_code": int(code), "message": message})
        raise
    if distributed.rank() == 0:
        _write(out, {"state": "complete", "exit_code": 0})


def read(out: Path) -> dict[str, Any]:
    """What `status.json` says; empty if there is none, or none that can be read."""
    try:
        content = json.loads((out / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(out: Path, content: dict[str, Any]) -> None:
    """Best effort: a disk that is full must not hide the error that is being recorded."""
    content |= {"rank": distributed.rank(), "host": socket.gethostname(), "process": os.getpid(), "time": time.time()}
    with suppress(OSError), whole_file(out / NAME, f".{os.getpid()}") as unfinished:
        unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")
