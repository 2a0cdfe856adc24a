"""What every command shares: words become settings, an error becomes one line on stderr and an exit code."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from . import distributed
from .distributed import rank, world
from .errors import UserError, describe

T = TypeVar("T")


@contextlib.contextmanager
def one_line(debug: bool = False) -> Iterator[None]:
    """The outermost frame of every command: an error inside ends the process with its line and its exit code.

    errors.py has the table of codes. `debug` (--debug, or SLICETUNE_DEBUG=1) shows the traceback instead.
    """
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


def parse(kind: type[T], words: Sequence[str], description: str, prog: str | None = None, **options: Any) -> Any:
    """The dataclass `kind` from a command's words, by tyro; fields without a default are positional.

    `options` are further ones of tyro.cli. Raises UserError for a bad value; tyro explains an unknown flag and exits
    with 2. tyro draws a box around a ValueError and exits: where that was a UserError, it is taken out of its context.
    """
    import tyro

    drawn = io.StringIO()
    try:
        with contextlib.redirect_stderr(drawn):
            config = (tyro.conf.PositionalRequiredArgs, tyro.conf.AvoidSubcommands)
            return tyro.cli(kind, args=words, prog=prog, description=description, config=config, **options)
    except SystemExit as stop:
        if error := _cause(stop):
            raise error from None
        if rank() == 0:
            sys.stderr.write(drawn.getvalue())
        raise


def _cause(error: BaseException | None) -> UserError | None:
    """The UserError that an exception was raised in the handling of."""
    while error is not None and not isinstance(error, UserError):
        error = error.__context__
    return error
