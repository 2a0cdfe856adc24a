"""Each kernel that walks over tokens or samples against torch eager, torch.compile and Liger.

    python bench/run.py cpu bench_kernels.py

`bytes` is the least that an operation must read and write, whoever computes it, so GB/s of two contenders compare;
the copy and the matrix product that bound them are timed in the same rounds. On a CPU ours is the plain-torch path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import Comparison, Contender, agree, tolerance
from micro import SECONDS, WIDTH, H, I, T, checked, chosen, compiled, copy_of, random, sample_of_token, segments
from shapes import DEVICE, DTYPE, FFN, GPU
from torch import Tensor

from slicetune.kernels.gated.op import gated_backward, gated_forward
from slicetune.kernels.gated.reference import gated_backward_reference, gated_forward_reference
from slicetune.kernels.histogram import BINS, accumulate, accumulate_reference
from slicetune.kernels.tap import tap, tap_reference

CHECKED = slice(0, 64)
"""Rows compared in float64: all of 8192 × 14336 would take longer than the timing."""


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


def test_gated_backward(benchmark, monkeypatch):
    """Plain, in place, and with scores and selected columns out of the same pass."""
    monkeypatch.setenv("SLICETUNE_COLUMNS", "kernel")  # the other way of getting them is a row of its own
    dh, gate, up = (random(T, I) for _ in range(3))
    index, segment = chosen(I), segments()
    sums = 1e-5 if torch.float32 == DTYPE else 1e-4
    rows = slice(0, FFN.length)
    want = gated_backward_reference(
        *(x[rows].double() for x in (dh, gate, up)), "silu", segments=segment[:1], gate_columns=index, up_columns=index
    )
    comparison = Comparison(benchmark, "SwiGLU backward", str(FFN), micro=True)
    facts = {"bytes": 5 * T * I * WIDTH}

    def right(pair: Any) -> None:
        agree(pair[0][rows], want.dgate, 2 * tolerance(DTYPE), "dgate")
        agree(pair[1][rows], want.dup, 2 * tolerance(DTYPE), "dup")

    def right_columns(out: Any) -> None:
        right(_pair(out))
        agree(out.dgate_columns[rows], want.dgate_columns, 2 * tolerance(DTYPE), "columns of dgate")
        agree(out.dup_columns[rows], want.dup_columns, 2 * tolerance(DTYPE), "columns of dup")

    def right_scores(out: Any) -> None:
        right(_pair(out))
        agree(out.gate_score[:1], want.gate_score, sums, "gate_score")
        agree(out.up_score[:1], want.up_score, sums, "up_score")
        agree(out.active[:1], want.active, 0.0, "active")
        if out.dgate_columns is not None:
            right_columns(out)

    def whole(**options: Any) -> Callable[[], Any]:
        return lambda: gated_backward(dh, gate, up, "silu", **options)

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

    def in_place(backward: Callable[[Tensor, Tensor], Any]) -> Contender:
        """On fresh values each time: of its own output a second run would make zeros and infinities."""
        a, b = gate.clone(), up.clone()

        def fresh() -> None:
            a.copy_(gate)
            b.copy_(up)

        right(backward(a, b))
        return Contender(lambda: backward(a, b), fresh, facts | {"note": "in place"})

    def liger() -> Contender:
        from liger_kernel.ops.swiglu import swiglu_backward

        return in_place(lambda a, b: swiglu_backward(a, b, dh))

    def ours_in_place() -> Contender:
        return in_place(lambda a, b: _pair(gated_backward(dh, a, b, "silu", inplace=True)))

    def then_select() -> Any:
        out = gated_backward(dh, gate, up, "silu")
        out.dgate_columns, out.dup_columns = out.dgate.index_select(1, index), out.dup.index_select(1, index)
        return out

    owner, fast = sample_of_token(), compiled(eager_backward)
    comparison.add("copy", copy_of(3 * T * I), "floor")
    comparison.add("ours", checked(lambda: _pair(whole()()), right, **facts), "ours")
    comparison.add("ours, in place", ours_in_place, "ours")
    comparison.add("ours with scores", checked(whole(segments=segment), right_scores, **facts), "ours")
    columns = {"gate_columns": index, "up_columns": index}
    both = {"segments": segment, **columns}
    comparison.add("ours with columns", checked(whole(**columns), right_columns, **facts), "ours")
    comparison.add("bare backward, then index_select", checked(then_select, right_columns, **facts), "ours")
    comparison.add("ours with scores and columns", checked(whole(**both), right_scores, **facts), "ours")
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
