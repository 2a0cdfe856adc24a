"""The command line of every recipe: settings in, one run or one dry run out.

    torchrun --nproc_per_node 8 recipes/caneft_llama31.py --data.dir DATA --out runs/caneft-de-en
    python recipes/caneft_llama31.py --dry-run

Flags are the fields of config.RunConfig by their dotted names (tyro). `one_line` is the one place where an error
becomes a line on stderr and an exit code (errors.py has the table); `--debug` or SLICETUNE_DEBUG=1 shows the traceback
instead.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence

from ..common import signals
from ..common.command import one_line
from ..common.distributed import rank
from ..common.errors import UserError
from .config import RunConfig

DRY_RUN_GPUS = 8
"""GPUs that a dry run counts with where neither --gpus nor torchrun says."""


def main(defaults: RunConfig, args: Sequence[str] | None = None) -> None:
    """Parse `args` (default: the command line) over a recipe's `defaults`, and run; exits as errors.Exit says."""
    args = list(sys.argv[1:] if args is None else args)
    signals.install()
    with one_line("--debug" in args):
        config = parse(defaults, [arg for arg in args if arg != "--debug"])
        if config.dry_run:
            dry_run(config, defaults)
        else:
            from .run import run

            run(config)


def parse(defaults: RunConfig, args: Sequence[str]) -> RunConfig:
    """`defaults` with what `args` set. Raises UserError for a bad value; tyro exits with 2 for an unknown flag.

    tyro draws a box around a ValueError and exits; where that was a UserError it is taken out of its context.
    """
    import tyro

    drawn = io.StringIO()
    try:
        with contextlib.redirect_stderr(drawn):
            description = f"{RunConfig.__doc__} --debug shows the traceback of an error in the settings or the data."
            whole = (tyro.conf.AvoidSubcommands,)  # a recipe's method is not chosen on the command line
            return tyro.cli(RunConfig, default=defaults, args=args, description=description, config=whole)
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


def dry_run(config: RunConfig, defaults: RunConfig) -> None:
    """Print what the run would need, on the first rank. A recipe's shape is that of the recipe's own model."""
    import torch

    from ..models.shapes import resolve
    from .forecast.estimate import describe

    if rank() != 0:
        return
    moved = config.model.path != defaults.model.path and config.shape == defaults.shape
    shape = resolve(config.model.path, "" if moved else config.shape)
    memory = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None
    memory = round(config.gpu_memory * 1e9) or memory
    ranks = config.gpus or int(os.environ.get("WORLD_SIZE", DRY_RUN_GPUS))
    print(describe(config, shape, ranks, memory), flush=True)
