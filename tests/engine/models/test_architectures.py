"""Every dense decoder that is found by structure: each step of the engine against an independent one."""

from __future__ import annotations

import architectures
import pytest

LIMITS = {"batches": 2e-5, "decoding": 0, "scores": 2e-5, "export": 2e-5, "delta": 0, "adapter": 5e-5, "audit": 0}


@pytest.mark.parametrize("name", architectures.MODELS)
def test_batches_decoding_scores_export_delta_adapter_and_audit(name, tmp_path):
    found = architectures.measure(name, tmp_path)
    assert found.pop("moved") > 0.01
    assert {key: value for key, value in found.items() if value > LIMITS[key]} == {}
