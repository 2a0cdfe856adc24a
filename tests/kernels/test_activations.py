"""The kernels' sigmoid on NVIDIA's parts, which is two approximate instructions, against float64 over the whole range.

No GPU runs here, so the sequence is computed with every instruction off by as much as the PTX manual allows it, up and
down; bench/gpu_kernels.py asks a GPU itself. The general form (an exponential, then a division) has the same bound.
"""

import itertools

import numpy as np
import pytest

from slicetune.kernels.common import activations

# Relative errors: PTX ISA, ex2.approx.ftz.f32 and rcp.approx.ftz.f32, and one rounding of float32.
EX2, RCP, ROUND = 2.0**-22, 2.0**-23, 2.0**-24
RANGE = np.concatenate([np.linspace(-86, 86, 40_001), np.geomspace(1e-30, 86, 4_001), -np.geomspace(1e-30, 86, 4_001)])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def fast(x, ex2, rcp):
    """The kernel's sequence in float32, with each approximate instruction off by a factor."""
    t = (x.astype(np.float32) * np.float32(-1.4426950408889634)).astype(np.float64)
    e = (np.exp2(t) * (1 + ex2)).astype(np.float32)
    e = np.where(np.abs(e) < 2.0**-126, np.float32(0), e)  # ftz
    s = (np.float32(1) + e).astype(np.float64)
    return ((1 / s) * (1 + rcp)).astype(np.float32).astype(np.float64)


@pytest.mark.parametrize(("up", "down"), [*itertools.product((-1, 0, 1), (-1, 0, 1))])
def test_relative_error_over_the_whole_range(up, down):
    """Worst where the exponential is large: it carries the rounding of x·log2 e, as the general form does."""
    x = RANGE.astype(np.float32).astype(np.float64)
    error = np.abs(fast(x, up * EX2, down * RCP) / sigmoid(x) - 1)
    bound = EX2 + RCP + 3 * ROUND + 1.6 * ROUND * np.abs(np.minimum(x, 0))
    assert (error <= bound).all(), f"{error.max():.2g} at {x[error.argmax()]}"
    assert error[np.abs(x) < 16].max() < 2e-6
    assert error.max() < 9e-6


def test_what_bfloat16_would_show_is_far_larger():
    x = RANGE[np.abs(RANGE) < 30].astype(np.float32).astype(np.float64)
    assert np.abs(fast(x, EX2, RCP) / sigmoid(x) - 1).max() < 2.0**-9 / 500


@pytest.mark.parametrize(("x", "want"), [(-np.inf, 0.0), (np.inf, 1.0), (-200.0, 0.0), (200.0, 1.0), (0.0, 0.5)])
def test_the_ends(x, want):
    with np.errstate(over="ignore", divide="ignore", under="ignore"):
        assert fast(np.array([x]), 0, 0)[0] == want


def test_it_is_in_the_machine_code_of_nvidias_parts_alone():
    pytest.importorskip("triton")
    from slicetune.kernels import compile
    from slicetune.kernels.gated import kernel as gated_kernels

    case = next(case for case in gated_kernels.aot() if case.name == "gated_forward silu bf16")
    ptx = compile.build(case, "sm_90").asm["ptx"]
    assert ptx.count("rcp.approx.ftz.f32") == ptx.count("ex2.approx.ftz.f32") > 0
    assert "div.full" not in ptx
    assert "ex2" not in compile.build(case, "gfx942").asm["amdgcn"]
    assert activations.ACTIVATIONS[0] == "silu"
