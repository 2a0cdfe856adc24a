"""The fused FFN with its kernels: gradients of slices against those of whole weights, and one product for gate and up.

On a CPU in the interpreter (test_interpreter.py runs it); on a GPU as it is.
"""

import pytest
import torch
from torch import nn

from slicetune.engine.models.sites import FFNSite
from slicetune.engine.slices.fused import FusedFFN
from slicetune.engine.slices.linear import SliceLinear
from slicetune.kernels import slice_gradient
from slicetune.kernels.common.dispatch import INTERPRET

DEVICE = "cpu" if INTERPRET else "cuda"
HIDDEN, UNITS, TOKENS = 24, 40, 37
ROWS = {"gate_proj": [1, 5, 39], "up_proj": [0, 2, 3, 30], "down_proj": [4, 23]}


class Gated(nn.Module):
    """A gated FFN written out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj, self.up_proj = (nn.Linear(HIDDEN, UNITS, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(UNITS, HIDDEN, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("axis", ["rows", "down columns"])
def test_slices_have_the_gradients_of_the_whole_weights(axis, monkeypatch):
    plain = Gated().to(DEVICE)
    x, dy = (torch.randn(TOKENS, HIDDEN, device=DEVICE) for _ in range(2))
    (plain(x) * dy).sum().backward()
    roles = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    ffn = FusedFFN(FFNSite(0, "mlp", plain, roles, "silu"))
    for name, rows in ROWS.items():
        index = torch.tensor(rows)
        chosen = {"columns": index} if name == "down_proj" and axis != "rows" else {"rows": index}
        setattr(ffn, name, SliceLinear(getattr(plain, name), **chosen))
    shapes, product = [], slice_gradient._product
    monkeypatch.setattr(
        slice_gradient, "_product", lambda a, b, i: (shapes.append(tuple(a.shape)), product(a, b, i))[1]
    )
    (ffn(x) * dy).sum().backward()
    assert shapes[0] == (TOKENS, 16), "gate and up: seven columns in one buffer of sixteen"
    assert len(shapes) == 2
    for name, rows in ROWS.items():
        sliced, whole = getattr(ffn, name), getattr(plain, name).weight.grad
        got, want = (
            (sliced.rows.grad, whole[rows]) if sliced.rows is not None else (sliced.columns.grad, whole[:, rows].t())
        )
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5), name
