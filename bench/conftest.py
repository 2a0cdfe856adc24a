"""pytest-benchmark's set-up: flat imports from this folder, and what hardware and versions a result was made with."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch


@pytest.hookimpl(optionalhook=True)  # the kernel tests run without pytest-benchmark
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    import about

    machine_info["slicetune"] = about.provenance()


@pytest.fixture(autouse=True)
def seeded():
    """Every benchmark draws the same numbers, and leaves no GPU memory to the next."""
    torch.manual_seed(0)
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
