"""Each kernel against torch eager, torch.compile, Liger, torch's fused AdamW on dense masks and PEFT's SHiRA.

    python bench/run.py cpu bench_kernels.py

`bytes` is the least that an operation must read and write, whoever computes it, so GB/s of two contenders compare;
the copy and the matrix product that bound them are timed in the same rounds. On a CPU ours is the plain-torch path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import footprint
import torch
import torch.nn.functional as F
from harness import Comparison, Contender, agree, tolerance
from shapes import DEVICE, DTYPE, FFN, GPU, NEURON_RATIO, SMOKE
from torch import Tensor, nn

from slicetune.engine.slices import SliceLinear
from slicetune.kernels.gated import gated_backward, gated_forward
from slicetune.kernels.gated_reference import gated_backward_reference, gated_forward_reference
from slicetune.kernels.histogram import BINS, accumulate, accumulate_reference
from slicetune.kernels.slice_gradient import column_gradient, row_gradient
from slicetune.kernels.tap import tap, tap_reference

T, H, I = FFN.tokens, FFN.model.hidden, FFN.model.intermediate
WIDTH = DTYPE.itemsize
SECONDS = 4.0 if not GPU else 2.0
CHECKED = slice(0, 64)
"""Rows compared in float64: all of 8192 × 14336 would take longer than the timing."""


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


def eager_forward(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def eager_backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The formulas in fp32, which torch.compile makes one kernel of."""
    d, g, u = dh.float(), gate.float(), up.float()
    share = torch.sigmoid(g)
    act = g * share
    return ((share + act * (1 - share)) * u * d).to(gate.dtype), (act * d).to(up.dtype)


def test_gated_forward(benchmark):
    gate, up = random(T, I), random(T, I)
    want = gated_forward_reference(gate[CHECKED].double(), up[CHECKED].double(), "silu")
    comparison = Comparison(benchmark, "SwiGLU forward", str(FFN), micro=True)
    facts = {"bytes": 3 * T * I * WIDTH}

    def right(h: Tensor) -> None:
        agree(h[CHECKED], want, 2 * tolerance(DTYPE))

    def liger() -> Contender:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return checked(lambda: LigerSiLUMulFunction.apply(gate, up), right, **facts)()

    fast = compiled(eager_forward)
    comparison.add("copy", copy_of(2 * T * I), "floor")
    comparison.add("ours", checked(lambda: gated_forward(gate, up, "silu"), right, **facts), "ours")
    comparison.add("torch eager", checked(lambda: eager_forward(gate, up), right, **facts))
    comparison.add("torch.compile", checked(lambda: fast(gate, up), right, **facts), "peer")
    if GPU:
        comparison.add("Liger", liger, "peer")
    comparison.measure(SECONDS)


def test_gated_backward(benchmark):
    """Plain, in place, and with scores and selected columns out of the same pass."""
    dh, gate, up = (random(T, I) for _ in range(3))
    index, segment = chosen(I), segments()
    rows = slice(0, FFN.length)
    want = gated_backward_reference(
        *(x[rows].double() for x in (dh, gate, up)), "silu", segments=segment[:1], gate_columns=index
    )
    comparison = Comparison(benchmark, "SwiGLU backward", str(FFN), micro=True)
    facts = {"bytes": 5 * T * I * WIDTH}

    def right(pair: Any) -> None:
        agree(pair[0][rows], want.dgate, 2 * tolerance(DTYPE), "dgate")
        agree(pair[1][rows], want.dup, 2 * tolerance(DTYPE), "dup")

    def right_scores(out: Any) -> None:
        right((out.dgate, out.dup))
        agree(out.gate_score[:1], want.gate_score, 1e-5 if torch.float32 == DTYPE else 1e-4, "gate_score")
        agree(out.up_score[:1], want.up_score, 1e-5 if torch.float32 == DTYPE else 1e-4, "up_score")
        agree(out.active[:1], want.active, 0.0, "active")
        if out.dgate_columns is not None:
            agree(out.dgate_columns[rows], want.dgate_columns, 2 * tolerance(DTYPE), "columns")

    def pair(**options: Any) -> Callable[[], Any]:
        def run() -> Any:
            out = gated_backward(dh, gate, up, "silu", **options)
            return out if "segments" in options else _pair(out)

        return run

    def eager() -> Contender:
        g, u = gate.clone().requires_grad_(), up.clone().requires_grad_()
        h = eager_forward(g, u)
        return checked(lambda: torch.autograd.grad(h, (g, u), dh, retain_graph=True), right, **facts)()

    def eager_scores() -> tuple[Tensor, ...]:
        dg, du = eager_backward(dh, gate, up)
        sums = [torch.zeros(FFN.sentences, I, device=DEVICE) for _ in range(3)]
        for into, value in zip(sums, ((gate * dg).abs(), (up * du).abs(), gate > 0), strict=True):
            into.index_add_(0, owner, value.float())
        return dg, du, *sums

    def liger() -> Contender:
        from liger_kernel.ops.swiglu import swiglu_backward

        right(swiglu_backward(gate.clone(), up.clone(), dh))
        a, b = gate.clone(), up.clone()
        return Contender(lambda: swiglu_backward(a, b, dh), facts=facts | {"note": "in place"})

    def in_place() -> Contender:
        right(_pair(gated_backward(dh.clone(), gate.clone(), up.clone(), "silu", inplace=True)))
        a, b, d = gate.clone(), up.clone(), dh.clone()
        return Contender(lambda: gated_backward(d, a, b, "silu", inplace=True), facts=facts | {"note": "in place"})

    owner, fast = sample_of_token(), compiled(eager_backward)
    comparison.add("copy", copy_of(3 * T * I), "floor")
    comparison.add("ours", checked(pair(), right, **facts), "ours")
    comparison.add("ours, in place", in_place, "ours")
    comparison.add("ours with scores", checked(pair(segments=segment), right_scores, **facts), "ours")
    columns = {"segments": segment, "gate_columns": index, "up_columns": index}
    comparison.add("ours with scores and columns", checked(pair(**columns), right_scores, **facts), "ours")
    comparison.add("torch eager (autograd)", eager)
    comparison.add("torch eager with scores", checked(eager_scores, right, **facts))
    comparison.add("torch.compile", checked(lambda: fast(dh, gate, up), right, **facts), "peer")
    if GPU:
        comparison.add("Liger", liger, "peer")
    comparison.measure(2 * SECONDS)


def _pair(out: Any) -> tuple[Tensor, Tensor]:
    return out.dgate, out.dup


def test_tap(benchmark):
    y, dy, segment, owner = random(T, H), random(T, H), segments(), sample_of_token()
    want = tap_reference(y[: FFN.length].double(), dy[: FFN.length].double(), segment[:1])
    comparison = Comparison(benchmark, "down tap", str(FFN), micro=True)
    facts = {"bytes": 2 * T * H * WIDTH}

    def eager() -> Tensor:
        out = torch.zeros(FFN.sentences, H, device=DEVICE)
        return out.index_add_(0, owner, (y.float() * dy.float()).abs())

    def right(scores: Tensor) -> None:
        agree(scores[:1], want, 1e-5)

    fast = compiled(eager)
    comparison.add("copy", copy_of(2 * T * H), "floor")
    comparison.add("ours", checked(lambda: tap(y, dy, segment), right, **facts), "ours")
    comparison.add("torch eager", checked(eager, right, **facts))
    comparison.add("torch.compile", checked(fast, right, **facts), "peer")
    comparison.measure(SECONDS)


def test_histogram(benchmark):
    """Scores of one projection of one layer, of as many sentences as a scoring batch has."""
    scores = torch.rand(FFN.sentences, I, device=DEVICE).square().mul_(1e-4)
    groups = torch.arange(FFN.sentences, device=DEVICE) % 4
    counts = torch.zeros(4, I, BINS, dtype=torch.int32, device=DEVICE)
    own = torch.zeros_like(counts)
    want = torch.zeros_like(counts)
    accumulate_reference(scores, groups, want, -40)
    comparison = Comparison(benchmark, "histogram", f"{FFN.sentences} samples × {I} neurons × 4 groups", micro=True)

    def eager(into: Tensor) -> Tensor:
        bin = ((scores.view(torch.int32) >> 20) - ((127 - 40) << 3)).clamp(0, 255)
        cell = (groups[:, None] * I + torch.arange(I, device=DEVICE)) * BINS + bin
        into += torch.bincount(cell.flatten(), minlength=into.numel()).view_as(into).to(into.dtype)
        return into

    def ours() -> Contender:
        accumulate(scores, groups, counts, -40)
        agree(counts, want, 0.0)
        return Contender(lambda: accumulate(scores, groups, counts, -40), facts=facts)

    facts = {"bytes": scores.numel() * (4 + 64)}
    comparison.add("ours", ours, "ours")
    comparison.add(
        "torch eager (bincount)",
        lambda: (agree(eager(own), want, 0.0), Contender(lambda: eager(own), facts=facts))[1],
    )
    comparison.measure(SECONDS)


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

    from slicetune.engine import ffn

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
