"""What the kernels' benchmarks share: their sizes and inputs, and the copy and the product that bound them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import Contender
from shapes import DEVICE, DTYPE, FFN, GPU, NEURON_RATIO, SMOKE
from torch import Tensor

T, H, I = FFN.tokens, FFN.model.hidden, FFN.model.intermediate
WIDTH = DTYPE.itemsize
SECONDS = 4.0 if not GPU else 2.0


def random(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def segments() -> Tensor:
    starts = torch.arange(FFN.sentences, dtype=torch.int32, device=DEVICE) * FFN.length
    return torch.stack([starts, starts + FFN.length], 1)


def sample_of_token() -> Tensor:
    return torch.arange(FFN.sentences, device=DEVICE).repeat_interleave(FFN.length)


def chosen(width: int) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randperm(width, generator=draw)[: max(1, round(NEURON_RATIO * width))].sort().values.to(DEVICE)


def copy_of(elements: int) -> Callable[[], Contender]:
    """The memory's ceiling: torch's copy of as many bytes as the operation reads, 32 MB at least."""

    def make() -> Contender:
        source = torch.ones(max(elements * WIDTH, 32 << 20 if not SMOKE else 0) // 4, device=DEVICE)
        target = torch.empty_like(source)
        return Contender(lambda: target.copy_(source), facts={"bytes": 8 * source.numel()})

    return make


def product_of(m: int, k: int, n: int) -> Callable[[], Contender]:
    """The arithmetic's ceiling: the vendor's matrix product."""

    def make() -> Contender:
        a, b = random(m, k), random(k, n)
        out = torch.empty(m, n, dtype=DTYPE, device=DEVICE)
        return Contender(lambda: torch.mm(a, b, out=out), facts={"flops": 2 * m * k * n})

    return make


def checked(run: Callable[[], Any], check: Callable[[Any], None], **facts: Any) -> Callable[[], Contender]:
    """A contender whose result `check` has accepted."""

    def make() -> Contender:
        check(run())
        return Contender(run, facts=facts)

    return make


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False, backend="eager" if SMOKE else "inductor")
