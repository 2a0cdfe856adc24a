"""The tap on a CPU: per-sample sums of y·dy against a loop over samples and against autograd."""

import pytest
import torch

from slicetune.kernels.common import torch_blocks
from slicetune.kernels.tap import tap, tap_reference

pytestmark = pytest.mark.usefixtures("poisoned")
SEGMENTS = torch.tensor([[2, 7], [7, 7], [9, 30]], dtype=torch.int32)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(torch_blocks, "CPU_BLOCK", 32)


@pytest.mark.parametrize("reduce", ["mean_abs", "abs_sum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tap(dtype, reduce):
    torch.manual_seed(0)
    y, dy = (torch.randn(33, 13, dtype=torch.float64).to(dtype) for _ in range(2))
    exact = y.double() * dy.double()
    want = [(exact if reduce == "abs_sum" else exact.abs())[a:b].sum(0) for a, b in SEGMENTS.tolist()]
    for got in (tap(y, dy, SEGMENTS, reduce), tap_reference(y, dy, SEGMENTS, reduce)):
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert ((got - torch.stack(want)).norm() / exact.norm()).item() < (1e-14 if dtype == torch.float64 else 1e-6)
        assert torch.equal(got[1], torch.zeros_like(got[1]))


def test_tap_is_the_score_of_down():
    """Eq. 8 by autograd: y of a linear layer, its gradient from a loss, the mean over one sample's tokens."""
    torch.manual_seed(1)
    x, weight = torch.randn(33, 5, dtype=torch.float64), torch.randn(13, 5, dtype=torch.float64, requires_grad=True)
    y = x @ weight.t()
    (dy,) = torch.autograd.grad(y.square().sum(), y)
    got = tap(y.detach(), dy, SEGMENTS)[2] / 21
    assert torch.allclose(got, (2 * y.detach().square())[9:30].mean(0))


def test_no_samples_and_opcheck():
    y = torch.randn(33, 13)
    assert tap(y, y, torch.empty(0, 2, dtype=torch.int32)).shape == (0, 13)
    torch.library.opcheck(torch.ops.slicetune.tap, (y, y.clone(), SEGMENTS, False))
    with pytest.raises(AssertionError, match="int32"):
        tap(y, y, SEGMENTS.long())
