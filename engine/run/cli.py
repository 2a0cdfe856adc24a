"""The command line of every recipe: settings in, one run or one dry run out.

    torchrun --nproc_per_node 8 recipes/caneft_llama31.py --data.dir DATA --out runs/caneft-de-en
    python recipes/caneft_llama31.py --dry-run

Flags are the fields of config.RunConfig by their dotted names (tyro). `one_line` (common/command.py) makes a line
on stderr and an exit code of an error; `--debug` or SLICETUNE_DEBUG=1 shows the traceback
instead.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ..common import command, signals
from ..common.command import one_line
from ..common.distributed import rank
from ..models.shapes import resolve
from .config import RunConfig
from .forecast.estimate import dry_run_text
from .run import run

DRY_RUN_GPUS = 8
"""GPUs that a dry run counts with where neither --gpus nor torchrun says."""


def main(defaults: RunConfig, args: Sequence[str] | None = None) -> None:
    """Parse `args` (default: the command line) over a recipe's `defaults`, and run; exits as errors.Exit says."""
    args = list(sys.argv[1:] if args is None else args)
    signals.install()
    with one_line("--debug" in args):
        config = parse(defaults, [arg for arg in args if arg != "--debug"])
        if config.dry_run:
            dry_run(config)
        else:
            run(config)


def parse(defaults: RunConfig, args: Sequence[str]) -> RunConfig:
    """`defaults` with what `args` set. Raises UserError for a bad value; exits with 2 for an unknown flag."""
    about = f"{RunConfig.__doc__} --debug shows the traceback of an error in the settings or the data."
    config = command.parse(RunConfig, args, about, default=defaults)
    if config.model.path != defaults.model.path and not any(arg.partition("=")[0] == "--shape" for arg in args):
        config.shape = ""  # a recipe's shape is that of the recipe's own model
    return config


def dry_run(config: RunConfig) -> None:
    """Print what the run would need, on the first rank."""
    import torch

    config.check_groups()
    if rank() != 0:
        return
    shape = resolve(config.model.path, config.shape)
    config.method.check(shape, len(config.data.groups))
    memory = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None
    memory = round(config.gpu_memory * 1e9) or memory
    ranks = config.gpus or int(os.environ.get("WORLD_SIZE", DRY_RUN_GPUS))
    print(dry_run_text(config, shape, ranks, memory), flush=True)
    if not config.gpus and "WORLD_SIZE" not in os.environ:  # one small GPU counted as eight seems to hold anything
        print(f"\n{ranks} GPUs were assumed: add --gpus 1 if you have one", flush=True)
