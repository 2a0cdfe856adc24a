"""The outermost frame of every command: an error becomes one line on stderr and an exit code."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from . import distributed
from .distributed import rank, world
from .errors import describe


@contextlib.contextmanager
def one_line(debug: bool = False) -> Iterator[None]:
    """Every command's outermost frame: an error inside ends the process with its line and its exit code."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if debug or os.environ.get("SLICETUNE_DEBUG") == "1":
            raise
        code, message = describe(error)
        agreed = getattr(error, "agreed", False)
        if rank() == 0 or not agreed:
            who = f"rank {rank()}: " if world() > 1 and not agreed else ""
            print(f"error: {who}{message}", file=sys.stderr, flush=True)
        if agreed:
            distributed.stop()  # else another rank may wait in a collective, and NCCL would wait for it
        sys.exit(int(code))
