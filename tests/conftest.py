"""Fixtures that many tests share. Two ranks that stay up: rank_pool.py; small models and data: toys.py."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_rank_is_left():
    """A test that ran as a rank leaves no group, and no variables that a process started later would take for its."""
    yield
    from slicetune.engine.common import distributed

    distributed.stop()
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def pool():
    from rank_pool import Pool

    ranks = Pool()
    yield ranks
    ranks.close()


@pytest.fixture
def bench(monkeypatch) -> None:
    """The benchmarks' modules can be imported."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench")


@pytest.fixture
def written(tmp_path) -> Path:
    """The file of a small study."""
    from studies import PLAN

    path = tmp_path / "trial.toml"
    path.write_text(PLAN)
    return path
