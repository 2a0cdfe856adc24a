"""One optimizer step over the slices of a whole model, against torch's fused AdamW: on compact copies, and on masks.

    python bench/run.py cpu bench_optimizer.py

Sizes are those of 1 % of all neurons of the 8B (32 layers) on a GPU, of four narrow layers on a CPU. What works on
dense weights is timed on one layer where all do not fit, and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import Comparison, Contender, agree
from micro import copy_of
from shapes import DEVICE, DTYPE, GPU, NEURON_RATIO, WHOLE_STEP
from torch import Tensor, nn

from slicetune.engine.slices.optim import SparseColumnAdamW

SHAPE = WHOLE_STEP.model
LR = 1e-3
DENSE_LAYERS = 1 if GPU else SHAPE.layers


def weights(layers: int = SHAPE.layers) -> list[Tensor]:
    """gate, up and down of each layer."""
    sizes = [(SHAPE.widths[role], SHAPE.fan_in[role]) for role in SHAPE.widths]
    return [torch.randn(*size, device=DEVICE).to(DTYPE) for _ in range(layers) for size in sizes]


def indices(layers: int = SHAPE.layers) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    widths = [SHAPE.widths[role] for _ in range(layers) for role in SHAPE.widths]
    picked = [torch.randperm(w, generator=draw)[: max(1, round(NEURON_RATIO * w))] for w in widths]
    return [index.sort().values.to(DEVICE) for index in picked]


def gradient(i: int, rows: int, width: int) -> Tensor:
    draw = torch.Generator(DEVICE).manual_seed(i)
    return torch.randn(rows, width, device=DEVICE, generator=draw).to(DTYPE)


def ours(whole: list[Tensor], chosen: list[Tensor], wanted: list[Tensor], **options: Any) -> Contender:
    """SparseColumnAdamW; checked by one step against torch's AdamW in float64."""
    params = []
    for i, (weight, index) in enumerate(zip(whole, chosen, strict=True)):
        p = nn.Parameter(weight[index].clone())
        p.slice_of = (weight, index, 0)
        p.grad = gradient(i, *p.shape)
        params.append(p)
    optimizer = SparseColumnAdamW(params, lr=LR, weight_decay=0.0, **options)
    before = [p.detach().double() for p in params]
    optimizer.step()
    limit = {torch.float32: 1e-3}.get(DTYPE, 0.05) if not options else 0.5
    for p, old, want, weight, index in zip(params, before, wanted, whole, chosen, strict=True):
        agree(p.detach(), want, 1e-6 if torch.float32 == DTYPE and not options else 1e-2, "parameter")
        if not GPU:
            agree(p.detach().double() - old, want - old, limit, "update")
        agree(weight[index], p.detach(), 0.0, "row in the weight")
    count = sum(p.numel() for p in params)
    state = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())
    moved = _bytes(optimizer, params[0]) * count
    return Contender(optimizer.step, facts={"bytes": moved, "trainable": count, "optimizer_bytes": state})


def _bytes(optimizer: SparseColumnAdamW, p: Tensor) -> float:
    """Least traffic an element: gradient, parameter written, weight written, and each state read and written."""
    state = optimizer.state[p]
    own = sum(2 * t.numel() * t.element_size() for t in state.values() if t.dim()) / p.numel()
    read = 0 if "master" in state else p.element_size()
    return p.grad.element_size() + read + 2 * p.element_size() + own


def compact(whole: list[Tensor], chosen: list[Tensor]) -> Contender:
    """torch's fused AdamW on fp32 copies of the rows, then each copied back: what a user would write."""
    params = [nn.Parameter(w[i].float()) for w, i in zip(whole, chosen, strict=True)]
    for i, p in enumerate(params):
        p.grad = gradient(i, *p.shape).float()
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=0.0, fused=True)

    def run() -> None:
        optimizer.step()
        for p, weight, index in zip(params, whole, chosen, strict=True):
            weight.index_copy_(0, index, p.detach().to(weight.dtype))

    return Contender(run, facts={"optimizer_bytes": sum(8 * p.numel() for p in params)})


def dense(fused: bool) -> Callable[[], Contender]:
    """Gradients of whole weights times a 0/1 mask, then AdamW over all weights."""

    def make() -> Contender:
        params = [nn.Parameter(w) for w in weights(DENSE_LAYERS)]
        masks = [torch.zeros_like(p) for p in params]
        for i, (p, mask, index) in enumerate(zip(params, masks, indices(DENSE_LAYERS), strict=True)):
            mask[index] = 1
            p.grad = gradient(i, *p.shape)
        optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=0.0, fused=fused or None)

        def run() -> None:
            for p, mask in zip(params, masks, strict=True):
                p.grad.mul_(mask)
            optimizer.step()

        size = sum(2 * p.numel() * p.element_size() for p in params)
        return Contender(run, facts={"optimizer_bytes": size, "layers": DENSE_LAYERS})

    return make


def test_optimizer(benchmark):
    whole, chosen = weights(), indices()
    wanted = []
    for i, (weight, index) in enumerate(zip(whole, chosen, strict=True)):
        p = nn.Parameter(weight[index].double())
        p.grad = gradient(i, *p.shape).double()
        torch.optim.AdamW([p], lr=LR, weight_decay=0.0).step()
        wanted.append(p.detach())
    originals = [w[i].clone() for w, i in zip(whole, chosen, strict=True)]

    def restored(make: Callable[[], Contender]) -> Callable[[], Contender]:
        def built() -> Contender:
            for weight, index, rows in zip(whole, chosen, originals, strict=True):
                weight.index_copy_(0, index, rows)
            return make()

        return built

    setting = f"{SHAPE.layers} layers, hidden {SHAPE.hidden}, 1 % of rows, weights {str(DTYPE).removeprefix('torch.')}"
    comparison = Comparison(benchmark, "AdamW over slices", setting, micro=True)
    comparison.add("copy", copy_of(sum(x.numel() for x in originals) * 4), "floor")
    comparison.add("ours", restored(lambda: ours(whole, chosen, wanted)), "ours")
    comparison.add("ours, 8-bit moments", restored(lambda: ours(whole, chosen, wanted, moments="8bit")), "ours")
    if torch.bfloat16 == DTYPE:
        comparison.add("ours, no master", restored(lambda: ours(whole, chosen, wanted, master=False)), "ours")
    comparison.add("torch fused AdamW on copies, copied back", restored(lambda: compact(whole, chosen)))
    where = f" ({DENSE_LAYERS} of {SHAPE.layers} layers)" if SHAPE.layers > DENSE_LAYERS else ""
    comparison.add(f"mask and fused AdamW on whole weights{where}", dense(True))
    comparison.add(f"mask and AdamW on whole weights{where}", dense(False))
    comparison.measure(10 if not GPU else 3)
