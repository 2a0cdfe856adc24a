"""Fixtures of the kernel tests."""

import pytest
import torch


@pytest.fixture
def poisoned():
    """torch.empty gives NaN (integers: the largest), so that an output that is not written shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.ones(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
