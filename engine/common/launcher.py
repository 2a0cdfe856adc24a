"""What launchers leave in the environment: whether it makes one job of this process, before anything relies on it.

torchrun gives every process five variables. mpirun and srun give others, which nothing here reads: their processes
would each be a whole run, all in one --out. torchrun's agent in turn reads a file in which a process says why it ended.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, MutableMapping
from contextlib import suppress

from .errors import UserError

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets, and what torch and DeepSpeed need of it."""
PLACES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
"""Those that say which of how many processes this is: MASTER_ADDR alone is set on many clusters and means nothing."""
COUNTS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""How many processes mpirun or srun has started. (SLURM_NTASKS is set in a batch script's only process too.)"""
NUMBERS = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "PMI_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK")
NUMBERS += ("SLURM_PROCID",)
"""Which of them this is, from 0."""
CLASHES = ("OMPI_COMM_WORLD_LOCAL_RANK",)
"""What DeepSpeed reads besides, and wants to equal LOCAL_RANK: that of an mpirun which started torchrun cannot."""
UNSET = "env -u {} takes it out of the environment"
TORCHRUN = "start them by torchrun --nproc_per_node N, or one process without a launcher"


def check(environment: MutableMapping[str, str]) -> None:
    """Raises UserError unless the variables are torchrun's, whole, or those of a process that was started alone.

    Takes out what would contradict torchrun's.
    """
    if any(name in environment for name in PLACES):
        _check_torchruns(environment)
        for name in CLASHES:
            environment.pop(name, None)
        return
    for name in COUNTS:
        if (count := _number(environment, name) or 0) > 1:
            why = f"{count} processes were started, and each would be a run of its own in one --out"
            raise UserError(f"{name}={count} without RANK: {why}: {TORCHRUN}; if it is alone, {UNSET.format(name)}")
    for name in NUMBERS:
        if number := _number(environment, name):
            why = "this is one of several processes, and each would be a run of its own in one --out"
            raise UserError(f"{name}={number} without RANK: {why}: {TORCHRUN}; if it is alone, {UNSET.format(name)}")


def _check_torchruns(environment: Mapping[str, str]) -> None:
    there = [name for name in PLACES if name in environment]
    if missing := [name for name in NEEDED if not environment.get(name)]:
        given = " ".join(f"{name}={environment[name]}" for name in there)
        unset = " ".join(f"-u {name}" for name in there)
        raise UserError(
            f"{given} is set, but not {' '.join(missing)}: torchrun sets all five; of one process, "
            f"env {unset} takes them out of the environment"
        )
    rank, world, local = (_number(environment, name) for name in PLACES)
    if not world or rank >= world or local >= world:
        raise UserError(f"RANK={rank} LOCAL_RANK={local} WORLD_SIZE={world}: ranks count from 0 to WORLD_SIZE - 1")
    _number(environment, "MASTER_PORT")


def _number(environment: Mapping[str, str], name: str) -> int | None:
    """The value of a variable; None where it is not set. Raises UserError for what is no number."""
    value = environment.get(name)
    if value is None:
        return None
    if not (value.isascii() and value.isdigit()):
        raise UserError(f"{name}={value!r}: not a number: start by torchrun, or {UNSET.format(name)}")
    return int(value)


def tell_agent(message: str) -> None:
    """Let torchrun's summary, which it prints last, say why this process ends; nothing without torchrun.

    The format is what torch.distributed.elastic.multiprocessing.errors reads; its own writer would write a traceback.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        about = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError), open(file, "w", encoding="utf-8") as opened:
            json.dump({"message": about}, opened)
