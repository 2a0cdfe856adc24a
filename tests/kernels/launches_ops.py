"""Every op through Triton's JIT for an H100 that is not there: each launch is compiled for sm_90.

    python launches_ops.py         # prints JSON: what each case should launch and what it has launched

Few tokens, at the widths of Llama-3.1-8B (14336 and 4096), of BLOOM (16384), and at odd ones: rows of an odd width are
not aligned, which is another program. A case that does not compile, or does not fit an H100, raises.
"""

import json
import os
import sys
from collections.abc import Callable
from functools import partial

import fake_gpu
import torch
from torch import Tensor, nn

from slicetune.engine.slices.linear import slice_linears
from slicetune.engine.slices.optim import SparseColumnAdamW
from slicetune.engine.slices.written import leave_to_optimizer
from slicetune.kernels import histogram
from slicetune.kernels.adamw.op import adamw_
from slicetune.kernels.adamw.reference import Slice
from slicetune.kernels.common.fold import Segments
from slicetune.kernels.gated.op import gated_backward, gated_forward
from slicetune.kernels.histogram import Into, accumulate, add_scores, add_units, count
from slicetune.kernels.plain.op import plain_backward, plain_forward
from slicetune.kernels.slice_gradient import CONFIGS, chosen, column_gradient, compact_gradient, plan, row_gradient
from slicetune.kernels.tap import tap

gpu = fake_gpu.install()

HIDDEN, UNITS, BLOOM, ODD = 4096, 14336, 16384, 1001
TOKENS, LONG = 37, 700
RANGES = [(0, 12), (15, 37)]
LONG_RANGES = [(0, 12), (15, 600)]  # of three tiles: its sums are folded
FORWARD, BACKWARD, FOLD, TABLE = "_forward_kernel", "_backward_kernel", "_fold_kernel", "_table_kernel"
PRODUCT, HISTOGRAM, TAP, ADAMW = "_product_kernel", "_histogram_kernel", "_tap_kernel", "adamw_kernel"

CASES: dict[str, tuple[list[str], Callable]] = {}


def case(name: str, launches: list[str], run: Callable, *arguments: object, **keywords: object) -> None:
    CASES[name] = launches, partial(run, *arguments, **keywords)


def half(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def routing(width: int) -> dict[str, Tensor]:
    return {"gain": torch.zeros(3, width), "route": torch.zeros(TOKENS, dtype=torch.int64)}


def columns(*names: str, width: int = UNITS) -> dict[str, Tensor]:
    """Index tensors of an odd number of units."""
    return {f"{name}_columns": torch.arange(3 + i, width, width // 13) for i, name in enumerate(names)}


def gated_cases() -> None:
    def forward(width: int, **asked: object) -> None:
        gated_forward(half(TOKENS, width), half(TOKENS, width), "silu", **asked)

    def backward(width: int = UNITS, tokens: int = TOKENS, activation: str = "silu", **asked: object) -> None:
        gated_backward(*(half(tokens, width) for _ in range(3)), activation, **asked)

    def select(**asked: object) -> None:
        os.environ["SLICETUNE_COLUMNS"] = "select"
        backward(**asked)
        del os.environ["SLICETUNE_COLUMNS"]

    trained = columns("gate", "up", "h") | {"emit_h": True, "inplace": True}
    table = torch.tensor(LONG_RANGES, dtype=torch.int32)
    case("gated forward", [FORWARD], forward, UNITS)
    case("gated forward, odd", [FORWARD], forward, ODD)
    case("gated forward, routed", [FORWARD], forward, UNITS, **routing(UNITS))
    case("gated backward", [BACKWARD], backward)
    case("gated backward, odd, in place", [BACKWARD], backward, ODD, inplace=True)
    case("gated backward, columns and h", [BACKWARD], backward, **trained)
    odd = columns("gate", "up", width=ODD) | {"emit_h": True}
    case("gated backward, columns and h, odd", [BACKWARD], backward, ODD, **odd)
    case("gated backward, columns selected", [BACKWARD], select, **trained)
    case("gated backward, scores", [BACKWARD], backward, segments=Segments(RANGES), inplace=True)
    case("gated backward, scores, odd", [BACKWARD], backward, ODD, segments=Segments(RANGES))
    case("gated backward, scores of long", [BACKWARD, FOLD], backward, tokens=LONG, segments=Segments(LONG_RANGES))
    case("gated backward, scores, odd, of a tensor", [TABLE, BACKWARD, FOLD], backward, ODD, LONG, segments=table)
    everything = trained | routing(UNITS) | {"segments": Segments(RANGES), "reduce": "abs_sum"}
    case("gated backward, everything", [BACKWARD], backward, activation="gelu_tanh", **everything)


def plain_cases() -> None:
    bias = half(BLOOM)

    def backward(width: int = BLOOM, **asked: object) -> None:
        plain_backward(half(TOKENS, width), half(TOKENS, width), "gelu_tanh", **asked)

    case("plain forward", [FORWARD], lambda: plain_forward(half(TOKENS, BLOOM), "gelu_tanh", bias))
    case("plain forward, odd", [FORWARD], lambda: plain_forward(half(TOKENS, ODD), "gelu_tanh"))
    case("plain backward, odd", [BACKWARD], backward, ODD)
    trained = columns("pre", "h", width=BLOOM) | {"emit_h": True}
    case("plain backward, columns and h", [BACKWARD], backward, bias=bias, **trained)
    case("plain backward, scores", [BACKWARD], backward, bias=bias, segments=Segments(RANGES))
    everything = trained | routing(BLOOM) | {"segments": Segments(RANGES), "reduce": "abs_sum"}
    case("plain backward, everything", [BACKWARD], backward, bias=bias, **everything)


def score_cases() -> None:
    def scores(width: int, lengths: Tensor | None, counts: Tensor | None) -> None:
        low, high = torch.zeros(2, dtype=torch.int64).unbind()
        total = torch.zeros(4, 3, width, dtype=torch.float64)[:, 1]
        add_scores(torch.zeros(2, width), lengths, groups, Into(total, low, high, counts), -40)

    groups, lengths = torch.zeros(2, dtype=torch.int32), torch.ones(2)
    counts = {width: torch.zeros(4, width, histogram.BINS, dtype=torch.int32) for width in (HIDDEN, ODD)}
    units = [torch.zeros(4, 3, UNITS, dtype=dtype)[:, 1] for dtype in (torch.int64, torch.float64)]
    active = torch.zeros(2, UNITS, dtype=torch.int32)
    case("tap", [TAP], lambda: tap(half(TOKENS, HIDDEN), half(TOKENS, HIDDEN), Segments(RANGES)))
    case("tap, odd", [TAP], lambda: tap(half(TOKENS, ODD), half(TOKENS, ODD), Segments(RANGES), "abs_sum"))
    case("accumulate", [HISTOGRAM], lambda: accumulate(torch.zeros(2, HIDDEN), groups, counts[HIDDEN], -40))
    case("scores", [HISTOGRAM], scores, HIDDEN, lengths, counts[HIDDEN])
    case("scores, odd, sums alone", [HISTOGRAM], scores, ODD, None, counts[ODD])
    case("scores, counts elsewhere", [HISTOGRAM], scores, HIDDEN, lengths, None)
    for width in (HIDDEN, ODD):
        codes = torch.zeros(2, width, dtype=torch.uint8)
        case(f"bins counted, {width}", ["_count_kernel"], count, codes, groups, counts[width])
    case("units", ["_units_kernel"], lambda: add_units(active, torch.zeros(2, UNITS), lengths, groups, *units))


def product_cases() -> None:
    def tile(tokens: int, k: int, n: int) -> str:
        return "large" if chosen("sm_90", tokens, k, n)[0] is CONFIGS["sm_90"] else "small"

    rows, few = torch.arange(143), torch.arange(0, HIDDEN, 100)
    assert plan(len(few), 512, CONFIGS["sm_90"]) == "gather"
    assert (tile(512, 144, HIDDEN), tile(TOKENS, 48, UNITS), tile(TOKENS, 144, HIDDEN)) == ("large", "small", "small")
    assert tile(4096, len(rows), 512) == "large"
    case("gather, small", [PRODUCT], lambda: row_gradient(half(TOKENS, HIDDEN), half(TOKENS, 512), few))
    case("gather, odd", [PRODUCT], lambda: column_gradient(half(TOKENS, 501), half(TOKENS, ODD), few[:9]))
    case("gather, large", [PRODUCT, FOLD], lambda: row_gradient(half(4096, 160), half(4096, 512), rows))
    case("selected, then compact", [PRODUCT], lambda: row_gradient(half(TOKENS, HIDDEN), half(TOKENS, UNITS), few))
    case("compact, large", [PRODUCT, FOLD], lambda: compact_gradient(half(512, 144), half(512, HIDDEN)))
    case("compact, small, odd", [PRODUCT], lambda: compact_gradient(half(TOKENS, 143), half(TOKENS, ODD)))


def slice_of(dtype: torch.dtype, width: int, weight: Tensor | None = None, axis: int = 0, **more: object) -> Slice:
    param = torch.zeros(11, width, dtype=dtype)
    moments = more.pop("moments", (torch.float32, torch.float32))
    first, second = (torch.zeros(11, width, dtype=moment) for moment in moments)
    place = {} if weight is None else {"weight": weight, "index": torch.arange(11), "axis": axis}
    return Slice(param, torch.zeros_like(param), first, second, 1, 1e-3, 0.9, 0.999, 1e-8, 0.01, **place, **more)


def adamw_cases() -> None:
    def step(s: Slice, **more: object) -> None:
        adamw_([s], **more)

    def optimizer(master: bool, width: int, **more: object) -> None:
        model = nn.Sequential(nn.Linear(width, 64, dtype=torch.bfloat16), nn.Linear(64, width, dtype=torch.bfloat16))
        params = slice_linears(model, rows={"0": [1, 5, 7]}, columns={"1": [2, 3]})
        for p in params:
            p.grad = torch.zeros_like(p)
        stepper = SparseColumnAdamW(params, master=master, **more)
        stepper.step()
        stepper.step()

    half_codes = {"moments": (torch.int8, torch.uint8)}
    half_codes |= {f"exp_avg{x}_absmax": torch.zeros(-(-11 * 4096 // 256)) for x in ("", "_sq")}
    clip = torch.ones(1)
    case("AdamW, fp32", [ADAMW], lambda: step(slice_of(torch.float32, HIDDEN), grad_scale=clip))
    case("AdamW, fp32 into bf16 rows", [ADAMW], lambda: step(slice_of(torch.float32, HIDDEN, half(64, HIDDEN))))
    case("AdamW, fp32 into bf16 columns", [ADAMW], lambda: step(slice_of(torch.float32, ODD, half(ODD, 64), 1)))
    case("AdamW, 8 bits", [ADAMW], lambda: step(slice_of(torch.float32, HIDDEN, half(64, HIDDEN), **half_codes)))
    # Rows and their biases, and columns: aligned, as far as they are.
    case("SparseColumnAdamW", [ADAMW] * 4, optimizer, True, HIDDEN)
    case("SparseColumnAdamW, odd, rounding", [ADAMW] * 2, optimizer, False, ODD)


def write_cases() -> None:
    def write(width: int) -> None:
        model = nn.Sequential(nn.Linear(width, 64, False, dtype=torch.bfloat16))
        slice_linears(model, rows={"0": [1, 5, 7]})
        leave_to_optimizer(model)()

    case("slices into weights", ["write_kernel"] * 2, write, HIDDEN)
    case("slices into weights, odd", ["write_kernel"] * 2, write, ODD)


def main() -> None:
    for add in (gated_cases, plain_cases, score_cases, product_cases, adamw_cases, write_cases):
        add()
    found = {}
    for name, (launches, run) in CASES.items():
        gpu.begin()
        print(name, file=sys.stderr)  # the last one is the one that raised
        run()
        found[name] = [launches, gpu.launches]
    print(json.dumps({"cases": found, "compiled": gpu.compiled}))


if __name__ == "__main__":
    main()
