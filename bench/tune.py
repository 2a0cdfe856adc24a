"""Which tiles the Triton kernels should be pinned to on the GPU at hand, at Llama-3.1-8B's shapes.

    python bench/run.py tune                        # make tune: on a GPU, offline, ≤ 5 minutes
    python bench/run.py tune --target sm_90         # no GPU: the grid, compiled ahead of time for one part

Every configuration of a stated grid is compiled ahead of time first; what spills or passes the part's shared memory is
dropped. The others are checked against float64 and against the pinned one's results, then timed in turn with it.
The histogram, the folds and AdamW have one configuration for all parts, and no table.

Nothing is changed: the best of each table is printed as the line to write into its file, and all go to
bench/results/tune-<device>.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from about import provenance
from harness import Wrong, agree, seconds_text, tolerance
from shapes import DEVICE, DTYPE, FFN, GPU
from torch import Tensor

from slicetune.kernels import compile as aot
from slicetune.kernels import gated_kernels, plain_kernels, slice_gradient
from slicetune.kernels import tap as tap_module
from slicetune.kernels.dispatch import Tile, architecture
from slicetune.kernels.gated import gated_backward, gated_forward
from slicetune.kernels.gated_reference import gated_backward_reference, gated_forward_reference
from slicetune.kernels.plain import plain_backward, plain_forward
from slicetune.kernels.plain_reference import plain_backward_reference, plain_forward_reference
from slicetune.kernels.slice_gradient import Config, compact_gradient
from slicetune.kernels.tap import tap, tap_reference

T, H, I = FFN.tokens, FFN.model.hidden, FFN.model.intermediate
SAMPLE = slice(0, FFN.length)
"""Tokens compared in float64: the first sample."""
GAIN = 1.02
"""A configuration must be this much faster than the pinned one to be worth a change."""


@dataclass(frozen=True)
class Table:
    """One pinned table of a kernel module, its grid, and what is run to choose in it."""

    module: Any
    name: str
    case: str
    """The AotCase that stands for it."""
    grid: list[Any]
    make: Callable[[], tuple[Callable[[], Any], Callable[[Any], list[tuple[Tensor, Tensor, float]]]]]
    """() → (run, what of its result must agree with what in float64, and how closely)."""

    @property
    def pins(self) -> dict[str, Any]:
        return getattr(self.module, self.name)

    @property
    def place(self) -> str:
        return f"kernels/{self.module.__name__.rpartition('.')[2]}.py {self.name}"

    def pinned(self, part: str) -> Any:
        return self.pins.get(part, self.pins.get("default", self.pins.get("sm_86")))

    def candidates(self, part: str) -> list[Any]:
        """The pinned configuration first, then the grid."""
        return list(dict.fromkeys([self.pinned(part), *self.grid]))

    def compiled(self, config: Any, part: str) -> aot.AotCase:
        case = next(c for c in self.module.aot() if c.name == self.case)
        if isinstance(config, Tile):
            sizes = {"ROWS": config.rows, "BLOCK_ROWS": config.block_rows, "BLOCK_COLS": config.block_cols}
            options = {"num_warps": config.warps}
        else:
            sizes = {"TOKENS": config.tokens, "SLICES": config.slices, "WIDTH": config.width}
            options = {"num_warps": config.warps, "num_stages": config.stages}
        sizes = {name: size for name, size in sizes.items() if name in case.constexprs}
        return dataclasses.replace(case, constexprs=case.constexprs | sizes, options=options, targets=(part,))


def tiles(*rows: int, most: int = 32) -> list[Tile]:
    """Blocks of 1 to 8 tokens by 256 to 1024 units in 4 or 8 warps, 8 to `most` elements a thread."""
    found = []
    for block_rows, block_cols, warps in itertools.product((1, 2, 4, 8), (256, 512, 1024), (4, 8)):
        if 8 <= block_rows * block_cols // (32 * warps) <= most:
            found += [Tile(max(n, block_rows), block_rows, block_cols, warps) for n in rows or (block_rows,)]
    return found


PRODUCTS = [
    Config(tokens, slices, width, warps, stages, 132)
    for tokens, slices, width, warps, stages in itertools.product((32, 64), (128,), (128, 256), (4, 8), (3, 4))
]


@functools.cache
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """dh, gate, up (or pre) [T, I]."""
    torch.manual_seed(0)
    return tuple(torch.randn(T, I, device=DEVICE).to(DTYPE) for _ in range(3))


def segments() -> Tensor:
    starts = torch.arange(FFN.sentences, dtype=torch.int32, device=DEVICE) * FFN.length
    return torch.stack([starts, starts + FFN.length], 1)


def index() -> Tensor:
    return torch.arange(0, I, 100, device=DEVICE)


def fields(got: Any, want: Any) -> list[tuple[Tensor, Tensor, float]]:
    """What two backward passes have in common: tokens of the first sample, its sums, its columns."""
    pairs = []
    for name, value in vars(want).items():
        if value is not None:
            own = getattr(got, name)
            limit = 1e-4 if own.dtype in (torch.float32, torch.int32) else 2 * tolerance(DTYPE)
            pairs.append((own[: value.shape[0]], value, limit))
    return pairs


def forward(gated: bool):
    _, gate, up = inputs()
    run = (lambda: gated_forward(gate, up, "silu")) if gated else (lambda: plain_forward(gate, "gelu_tanh", up[0]))
    wide = gate[SAMPLE].double(), up[SAMPLE].double()
    if gated:
        want = gated_forward_reference(*wide, "silu")
    else:
        want = plain_forward_reference(wide[0], "gelu_tanh", wide[1][0])
    return run, lambda h: [(h[SAMPLE], want, 2 * tolerance(DTYPE))]


def backward(gated: bool, sums: bool = False, columns: bool = False):
    tensors, more = inputs(), {}
    dh, gate, up = (x[SAMPLE].double() for x in tensors)
    if columns:
        more = {name: index() for name in (("gate_columns", "up_columns") if gated else ("pre_columns",))}
        more["h_columns"] = index()
    ranges = {"segments": segments()} if sums else {}
    first = {"segments": segments()[:1]} if sums else {}
    if gated:
        want = gated_backward_reference(dh, gate, up, "silu", **first, **more)
        return lambda: gated_backward(*tensors, "silu", **ranges, **more), lambda got: fields(got, want)
    want = plain_backward_reference(dh, gate, "gelu_tanh", up[0], **first, **more)
    pre, bias = tensors[:2], tensors[2][0]
    return lambda: plain_backward(*pre, "gelu_tanh", bias, **ranges, **more), lambda got: fields(got, want)


def taps():
    y, dy = (x[:, :H].contiguous() for x in inputs()[:2])
    want = tap_reference(y[SAMPLE].double(), dy[SAMPLE].double(), segments()[:1])
    return lambda: tap(y, dy, segments()), lambda got: [(got[:1], want, 1e-4)]


def gradients():
    columns, x = inputs()[0][:, :144].contiguous(), inputs()[1][:, :H].contiguous()
    want = columns.double().t() @ x.double()
    return lambda: compact_gradient(columns, x), lambda got: [(got, want, 1e-4)]


def tables() -> list[Table]:
    found = []
    for module, gated, family, activation in (
        (gated_kernels, True, "gated", "silu"),
        (plain_kernels, False, "plain", "gelu_tanh"),
    ):
        case = f"{family}_backward {activation} bf16"
        with_columns = f"{case} columns h" if gated else f"{case} gain columns h"
        make = functools.partial(backward, gated)
        found += [
            Table(module, "FORWARD", f"{family}_forward {activation} bf16", tiles(), functools.partial(forward, gated)),
            Table(module, "BACKWARD", case, tiles(), make),
            Table(module, "COLUMNS", with_columns, tiles(32, most=16), functools.partial(make, columns=True)),
            Table(module, "SCORES", f"{case} scores", tiles(256, most=16), functools.partial(make, sums=True)),
        ]
    found.append(Table(tap_module, "TAP", "tap bf16", tiles(256), taps))
    found.append(Table(slice_gradient, "CONFIGS", "slice_gradient compact bf16", PRODUCTS, gradients))
    return found


def verdict(number: int, config: Any, part: str) -> str:
    """Why a configuration is dropped, by ahead-of-time compilation; an empty string where it is not."""
    try:
        row = aot.inspect(tables()[number].compiled(config, part), part)
    except Exception as error:  # a tile that the compiler refuses
        return str(error).strip().split("\n")[0][:100]
    return "; ".join(row.faults)


def fit(all_tables: list[Table], part: str) -> list[list[Any]]:
    """The configurations of each table that compile within the part's limits, the pinned one first."""
    jobs = [(n, config) for n, table in enumerate(all_tables) for config in table.candidates(part)]
    workers = max(1, min(16, len(os.sched_getaffinity(0))))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:  # fork would share CUDA's state
        faults = list(pool.map(verdict, *zip(*jobs, strict=True), itertools.repeat(part), chunksize=4))
    kept: list[list[Any]] = [[] for _ in all_tables]
    for (n, config), fault in zip(jobs, faults, strict=True):
        if not fault:
            kept[n].append(config)
    return kept


def measured(table: Table, configs: list[Any], part: str, deadline: float) -> Iterator[dict[str, Any]]:
    """Check and time each configuration in the place of the pinned one, which is put back at the end."""
    from triton.testing import do_bench

    run, pairs = table.make()
    before = table.pins.get(part)
    try:
        for config in configs:
            if time.monotonic() > deadline:
                return
            table.pins[part] = config
            row = {"table": table.place, "config": repr(config)}
            try:
                for got, want, limit in pairs(run()):
                    agree(got, want, limit)
                row["seconds"] = do_bench(run, warmup=5, rep=20, quantiles=[0.5, 0.2, 0.8])[0] / 1000
            except Wrong as wrong:
                row["error"] = str(wrong)
            yield row
    finally:
        table.pins.pop(part)
        if before is not None:
            table.pins[part] = before


def tune(part: str, seconds: float, out: Path) -> int:
    deadline = time.monotonic() + seconds
    all_tables, rows = tables(), []
    for table, configs in zip(all_tables, fit(all_tables, part), strict=True):
        found = list(measured(table, configs, part, deadline))
        rows += found
        timed = sorted((row for row in found if "seconds" in row), key=lambda row: row["seconds"])
        wrong = [row["config"] for row in found if "error" in row]
        pinned = next((row for row in timed if row["config"] == repr(table.pinned(part))), None)
        left = f", {len(configs) - len(found)} left for want of time" if len(found) < len(configs) else ""
        print(f"[tune] {table.place}: {len(timed)} timed{left}" + (f", WRONG: {wrong}" if wrong else ""))
        if not timed or pinned is None:
            continue
        print(f"  pinned {pinned['config']}: {seconds_text(pinned['seconds'])}")
        if pinned["seconds"] > GAIN * timed[0]["seconds"]:
            print(f'  write "{part}": {timed[0]["config"]}: {seconds_text(timed[0]["seconds"])}', flush=True)
    name = "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name().lower())
    path = out / f"tune-{name}.json"
    path.write_text(json.dumps({"part": part, "provenance": provenance(), "rows": rows}, indent=1) + "\n")
    print(f"[tune] {path}")
    return int(any("error" in row for row in rows))


def list_grid(part: str) -> int:
    all_tables = tables()
    for table, configs in zip(all_tables, fit(all_tables, part), strict=True):
        print(f"[tune] {table.place} on {part}: {len(configs)} of {len(table.candidates(part))} fit")
        for config in configs:
            print(f"  {config!r}" + ("  (pinned)" if config == table.pinned(part) else ""))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=aot.TARGETS, help="list what fits on this part; nothing is timed")
    parser.add_argument("--seconds", type=float, default=270, help="stop timing after this long")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.target or not GPU:
        return list_grid(options.target or "sm_90")
    return tune(architecture(torch.empty(0, device=DEVICE)), options.seconds, options.out)


if __name__ == "__main__":
    raise SystemExit(main())
