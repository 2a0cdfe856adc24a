"""What every command shares: words become settings, an error becomes one line on stderr and an exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_origin, get_type_hints

from . import distributed, launcher, output
from .distributed import rank, world
from .errors import UserError, describe

T = TypeVar("T")


@contextlib.contextmanager
def one_line(debug: bool = False) -> Iterator[None]:
    """The outermost frame of every command: an error inside ends the process with its line and its exit code.

    errors.py has the table of codes. `debug` (--debug, or SLICETUNE_DEBUG=1) shows the traceback instead.
    """
    output.prepare()
    alone = True  # until the launcher's variables are known to be sound, nothing may read them
    try:
        launcher.check(os.environ)
        alone = False
        yield
    except (Exception, KeyboardInterrupt) as error:
        if debug or os.environ.get("SLICETUNE_DEBUG") == "1":
            raise
        code, message = describe(error)
        agreed = getattr(error, "agreed", False)
        who = "" if alone or agreed or world() == 1 else f"rank {rank()}: "
        if alone or not agreed or rank() == 0:
            print(f"error: {who}{message}", file=sys.stderr, flush=True)
        launcher.tell_agent(f"error: {who}{message}")
        if agreed or alone or world() == 1:
            distributed.stop()  # else another rank may wait in a collective, and NCCL would wait for it
        sys.exit(int(code))


def parse(kind: type[T], words: Sequence[str], description: str, prog: str | None = None, **options: Any) -> Any:
    """The dataclass `kind` from a command's words, by tyro; fields without a default are positional.

    `options` are further ones of tyro.cli. Raises UserError for a bad value; tyro explains an unknown flag and exits
    with 2. tyro draws a box around a ValueError and exits: where that was a UserError, it is taken out of its context.
    """
    import tyro

    _name_positionals(kind, tyro)
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
        if stop.code:
            launcher.tell_agent(drawn.getvalue())
        raise


def _name_positionals(kind: type, tyro: Any) -> None:
    """Let the help call positional words by their fields' names, in capitals, as in RUN."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        kind_of, required = hints[field.name], field.default is field.default_factory is dataclasses.MISSING
        if required and get_origin(kind_of) is not Literal:
            name = field.name.upper() + " …" * (get_origin(kind_of) is tuple)
            hints[field.name] = Annotated[kind_of, tyro.conf.arg(metavar=name, help_behavior_hint="(required)")]
    kind.__annotations__ = hints


def _cause(error: BaseException | None) -> UserError | None:
    """The UserError that an exception was raised in the handling of."""
    while error is not None and not isinstance(error, UserError):
        error = error.__context__
    return error
