"""Fixtures that many tests share. Two ranks that stay up: rank_pool.py; small models and data: toys.py."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest


@pytest.fixture(scope="session")
def pool():
    from rank_pool import Pool

    ranks = Pool()
    yield ranks
    ranks.close()
