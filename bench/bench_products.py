"""Products of an FFN: gradients of a few rows or columns, a whole frozen FFN, one layer of which 1 % is trained.

    python bench/run.py cpu bench_products.py

Against the whole gradient, torch.compile, and PEFT's SHiRA. Bytes and operations are counted as in bench_kernels.py.
"""

from __future__ import annotations

from typing import Any

import footprint
import torch
import torch.nn.functional as F
from harness import Comparison, Contender, agree
from micro import SECONDS, WIDTH, H, I, T, checked, chosen, compiled, copy_of, product_of, random
from shapes import DEVICE, DTYPE, FFN, NEURON_RATIO
from torch import Tensor, nn

from slicetune.engine.slices.linear import SliceLinear
from slicetune.kernels.slice_gradient import column_gradient, row_gradient


def slice_gradient(benchmark: Any, what: str, out: int, inner: int, axis: str) -> None:
    """1 % of a layer's rows or columns against the whole gradient, of which they are picked."""
    dy, x = random(T, out), random(T, inner)
    a, b = (dy, x) if axis == "row" else (x, dy)
    index, k = chosen(a.shape[1]), len(chosen(a.shape[1]))
    want = a[:, index].double().t() @ b.double()
    ours = row_gradient if axis == "row" else column_gradient
    comparison = Comparison(benchmark, f"slice gradient, {what}", f"{k} of {a.shape[1]}, {FFN}", micro=True)
    facts = {"bytes": T * (k + b.shape[1]) * WIDTH + 4 * k * b.shape[1], "flops": 2 * T * k * b.shape[1]}

    def right(grad: Tensor) -> None:
        agree(grad, want, 1e-5 if torch.float32 == DTYPE else 5e-3)

    whole = {"flops": 2 * T * out * inner}
    comparison.add("copy", copy_of(T * b.shape[1]), "floor")
    comparison.add("matrix product", product_of(T, H, I), "floor")
    comparison.add("ours", checked(lambda: ours(dy, x, index), right, **facts), "ours")
    comparison.add("torch: pick, then product", checked(lambda: a[:, index].t() @ b, right, **facts))
    comparison.add("torch: whole gradient, then pick", checked(lambda: (a.t() @ b)[index], right, **whole))
    comparison.measure(SECONDS)


def test_gradient_of_gate_rows(benchmark):
    slice_gradient(benchmark, "gate rows", I, H, "row")


def test_gradient_of_down_rows(benchmark):
    slice_gradient(benchmark, "down rows", H, I, "row")


def test_gradient_of_down_columns(benchmark):
    slice_gradient(benchmark, "down columns", H, I, "column")


def test_ffn(benchmark):
    """A frozen FFN, forward and backward, against its six matrix products alone."""
    import systems
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    from slicetune.engine.slices import ffn

    config = LlamaConfig(hidden_size=H, intermediate_size=I)
    plain = LlamaMLP(config).to(DEVICE, DTYPE).requires_grad_(False)
    holder = systems.sharing(nn.ModuleDict({"mlp": plain}))
    (fused,) = ffn.fuse(holder)
    x, dy = random(T, H).requires_grad_(), random(T, H)
    g, h = random(T, I), random(T, I)
    wg, wu, wd = plain.gate_proj.weight, plain.up_proj.weight, plain.down_proj.weight

    def both(module: nn.Module) -> Tensor:
        return torch.autograd.grad(module(x), x, dy)[0]

    def products() -> Tensor:
        xs = x.detach()
        F.linear(xs, wg), F.linear(xs, wu), F.linear(h, wd)
        dy @ wd
        return (g @ wg).addmm_(h, wu)

    def right(dx: Tensor) -> None:
        agree(dx, want, 1e-5 if torch.float32 == DTYPE else 2e-2)

    want, fast = both(plain), compiled(lambda: both(plain))
    flops = {"flops": 12 * T * H * I}
    saved = footprint.saved(lambda: fused(x), fused)
    # Between the products: read g, u and write h; read g, u, dh and write dg, du.
    between = {"between": 8 * T * I * WIDTH, "saved_bytes": saved}
    comparison = Comparison(benchmark, "frozen FFN, forward + dX", str(FFN), micro=True)
    comparison.add("copy", copy_of(3 * T * I), "floor")
    comparison.add("six matrix products alone", lambda: Contender(products, facts=flops), "floor")
    comparison.add("ours", checked(lambda: both(fused), right, **between, **flops), "ours")
    comparison.add("transformers' LlamaMLP", checked(lambda: both(plain), right, **flops))
    comparison.add("torch.compile of LlamaMLP", checked(fast, right, **flops), "peer")
    comparison.measure(2 * SECONDS)


def test_linear(benchmark):
    """One linear layer of which 1 % is trained: SHiRA builds the weight anew, a mask needs the whole gradient."""
    linear = nn.Linear(H, I, bias=False, device=DEVICE, dtype=DTYPE).requires_grad_(False)
    index = chosen(I)
    sliced = SliceLinear(linear, rows=index)
    x, dy = random(T, H).requires_grad_(), random(T, I)
    want_dx = dy @ linear.weight
    comparison = Comparison(benchmark, "linear layer, 1 % trained, forward + backward", str(FFN), micro=True)

    def both(module: nn.Module, *params: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(x), (x, *params), dy)

    def right(grads: tuple[Tensor, ...]) -> None:
        agree(grads[0], want_dx, 1e-5 if torch.float32 == DTYPE else 2e-2, "dx")

    def shira() -> Contender:
        from peft import ShiraConfig, inject_adapter_in_model

        rank = max(1, round(NEURON_RATIO * H * I / (H + I)))
        holder = nn.ModuleDict({"up": nn.Linear(H, I, bias=False, device=DEVICE, dtype=DTYPE)})
        holder["up"].weight.data.copy_(linear.weight)
        inject_adapter_in_model(ShiraConfig(r=rank, target_modules=["up"], random_seed=0), holder)
        params = [p for p in holder.parameters() if p.requires_grad]
        return checked(lambda: both(holder["up"], *params), right)()

    def dense() -> Contender:
        copy = nn.Linear(H, I, bias=False, device=DEVICE, dtype=DTYPE)
        copy.weight.data.copy_(linear.weight)
        mask = torch.zeros_like(copy.weight)
        mask[index] = 1

        def run() -> tuple[Tensor, Tensor]:
            dx, dw = both(copy, copy.weight)
            return dx, dw.mul_(mask)

        return checked(run, right)()

    comparison.add("frozen", checked(lambda: both(linear), right), "floor")
    comparison.add("ours: SliceLinear", checked(lambda: both(sliced, sliced.rows), right), "ours")
    comparison.add("whole gradient times a mask", dense)
    comparison.add("PEFT's SHiRA", shira, "peer")
    comparison.measure(SECONDS)
