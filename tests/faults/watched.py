"""Runs a script and lists every path that its process writes, makes, renames or deletes: test_deterministic.py.

SLICETUNE_WATCHED=list.txt python tests/faults/watched.py script.py arguments
"""

from __future__ import annotations

import atexit
import os
import runpy
import sys
from typing import Any

CHANGES = {
    "os.mkdir": 1,
    "os.remove": 1,
    "os.rmdir": 1,
    "os.rename": 2,
    "os.link": 2,
    "os.symlink": 2,
    "os.truncate": 1,
}
"""Audit event → how many of its arguments are paths."""


def watch(target: str) -> None:
    """Keep every such path, and write them to `target` when the process ends."""
    paths: set[str] = set()

    def see(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            found = [path] if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else []
        else:
            found = arguments[: CHANGES.get(event, 0)]
        paths.update(os.path.abspath(os.fsdecode(p)) for p in found if isinstance(p, str | bytes | os.PathLike))

    def write() -> None:
        with open(target, "w", encoding="utf-8") as file:
            file.writelines(f"{path}\n" for path in sorted(paths - {os.path.abspath(target)}))

    atexit.register(write)
    sys.addaudithook(see)


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    watch(os.environ["SLICETUNE_WATCHED"])
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
