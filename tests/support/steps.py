"""Small parameters and gradients for an optimizer's tests, and SparseColumnAdamW beside torch.optim.AdamW."""

from __future__ import annotations

import torch
from torch import nn

from slicetune.engine.slices.linear import slice_linears
from slicetune.engine.slices.optim import SparseColumnAdamW
from slicetune.kernels.common.dispatch import INTERPRET

KINDS = [
    (torch.float32, {}),
    (torch.float64, {}),
    (torch.bfloat16, {}),
    (torch.float16, {}),
    (torch.bfloat16, {"master": False}),
    (torch.float32, {"moments": "8bit"}),
    (torch.bfloat16, {"moments": "8bit", "master": False, "seed": 3}),
]
"""Types of parameters, and settings of SparseColumnAdamW for each."""


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in ((7, 33), (5,), (4, 256), ())]


def give_gradients(step: int, *lists: list[nn.Parameter]) -> None:
    """The same gradients to the parameters of each list."""
    for params in lists:
        g = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=g).to(p.dtype)


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    """To the bit; by the kernels, in the interpreter, to rounding, which cuts bfloat16 off there."""
    if not INTERPRET:
        return torch.equal(got, want)
    relative = 2**-7 if got.dtype == torch.bfloat16 else 2e-5
    return torch.allclose(got.double(), want.double(), rtol=relative, atol=1e-6)


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        give_gradients(step, params)
        optimizer.step()


def twins(groups=lambda params: params, dtype: torch.dtype = torch.float32, **settings) -> list[tuple]:
    """(parameters, optimizer) of SparseColumnAdamW and of torch.optim.AdamW, over what `groups` makes of them."""
    lists = parameters(dtype), parameters(dtype)
    kinds = SparseColumnAdamW, torch.optim.AdamW
    return [
        (params, kind(groups(params), **{"lr": 1e-2, **settings})) for params, kind in zip(lists, kinds, strict=True)
    ]


def assert_same_bits(ours: tuple, theirs: tuple) -> None:
    """Parameters and their states, by place; `same` where the other optimizer is torch's."""
    equal = torch.equal if type(ours[1]) is type(theirs[1]) else same
    for p, q in zip(ours[0], theirs[0], strict=True):
        assert equal(p, q)
        mine, other = ours[1].state.get(p, {}), theirs[1].state.get(q, {})
        assert mine.keys() == other.keys()
        assert all(mine[key].dtype == other[key].dtype and equal(mine[key], other[key]) for key in mine)


def sliced(dtype: torch.dtype = torch.float32, **settings) -> tuple[nn.Sequential, SparseColumnAdamW]:
    """A model of two layers, of which rows and columns are trained, and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 16), nn.ReLU(), nn.Linear(16, 24)).to(dtype)
    params = slice_linears(model, rows={"0": [1, 3, 4, 9, 11, 12, 15]}, columns={"2": [0, 5]})
    return model, SparseColumnAdamW(params, **{"lr": 1e-2, **settings})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps of a loop, each on input of its own; at the end the weights have their slices' values."""
    p = next(model.parameters())
    for step in steps:
        x = torch.randn(5, 40, generator=torch.Generator().manual_seed(step)).to(p)
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same_model(a: nn.Module, b: nn.Module) -> None:
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert torch.equal(p, q), name
