"""A run from its settings to results.json: locked, recorded, every stage in its order."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..common import distributed
from ..training.metrics import reset_peak_memory
from . import status
from .config import RunConfig
from .job import Run
from .stages import Lock


def run(config: RunConfig) -> dict[str, Any]:
    """Run every stage that is not done; returns the content of results.json. Raises UserError for bad input."""
    distributed.start()
    found = run_one(config)
    distributed.stop()  # after an error cli.one_line does, once it has said what is wrong
    return found


def run_one(config: RunConfig, work: Callable[[Run], Any] | None = None) -> Any:
    """`run` among ranks that are up already and stay so: one of several runs in the same processes (compare.py).

    `work` says how far: Run.select_stages, Run.train_stages, or (the default) Run.all; returns what that returns.
    """
    lock = Lock(Path(config.out))
    with lock, status.recorded(lock.out):
        torch.manual_seed(config.seed)
        reset_peak_memory()
        if config.deterministic:
            be_deterministic()
        return (work or Run.all)(Run(config))


def be_deterministic() -> None:
    """Deterministic kernels everywhere: torch's, cuBLAS's (a fixed workspace) and flash-attn's backward."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
    torch.use_deterministic_algorithms(True)
