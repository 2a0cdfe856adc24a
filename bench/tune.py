"""Which tiles the Triton kernels should be pinned to on the GPU at hand, at Llama-3.1-8B's shapes.

    python bench/run.py tune                        # make tune: on a GPU, offline, ≤ 240 s
    python bench/run.py tune --target sm_90         # no GPU: the grid, compiled ahead of time for one part

Only tables whose tile is in doubt are tried: the backward pass with columns and with scores, and the gradients of a
few rows. Every configuration of a stated grid is compiled ahead of time first; what spills or passes the part's shared
memory is dropped. The others are checked against float64 and against the pinned one's results, then timed in turn with
it.

Nothing is changed: the best of each table is printed as the line to write into its file; all go to
tune-<device>.json in --out, the file anew after each table.
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
from slicetune.kernels import slice_gradient
from slicetune.kernels.common import cases
from slicetune.kernels.common.dispatch import Tile, architecture
from slicetune.kernels.gated import kernel as gated_kernels
from slicetune.kernels.gated.op import gated_backward
from slicetune.kernels.gated.reference import gated_backward_reference
from slicetune.kernels.slice_gradient import Config, compact_gradient

T, H, I = FFN.tokens, FFN.model.hidden, FFN.model.intermediate
SAMPLE = slice(0, FFN.length)
"""Tokens compared in float64: the first sample."""
SLICES = 128
PROCESSORS = torch.cuda.get_device_properties(DEVICE).multi_processor_count if GPU else 132
"""Of an H100 or H200."""
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
    what: str = ""
    """Which shape, where several are tried for one table."""

    @property
    def pins(self) -> dict[str, Any]:
        return getattr(self.module, self.name)

    @property
    def place(self) -> str:
        return f"kernels/{self.module.__name__.rpartition('.')[2]}.py {self.name}{self.what}"

    def pinned(self, part: str) -> Any:
        return self.pins.get(part, self.pins.get("default", self.pins.get("sm_86")))

    def candidates(self, part: str) -> list[Any]:
        """The pinned configuration first, then the grid."""
        return list(dict.fromkeys([self.pinned(part), *self.grid]))

    def compiled(self, config: Any, part: str) -> cases.AotCase:
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


def products(k: int, width: int) -> list[Config]:
    """Tiles of k slices by the other width; the tokens are split so that about every multiprocessor has a program.

    Rounded up, some of them have two programs and the others wait; rounded down, all have one.
    """
    found = []
    for tokens, wide, warps, stages in itertools.product((32, 64), (128, 256), (4, 8), (3, 4)):
        tiles = -(-k // SLICES) * -(-width // wide)
        whole = tiles * max(1, PROCESSORS // tiles)
        found += [Config(tokens, SLICES, wide, warps, stages, n) for n in dict.fromkeys((PROCESSORS, whole))]
    return found


@functools.cache
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """dh, gate, up [T, I]."""
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


def backward(**asked: Any):
    """`asked`: what the engine wants from the same pass."""
    tensors = inputs()
    first = asked | ({"segments": segments()[:1]} if "segments" in asked else {})
    want = gated_backward_reference(*(x[SAMPLE].double() for x in tensors), "silu", **first)
    return lambda: gated_backward(*tensors, "silu", **asked), lambda got: fields(got, want)


def with_columns():
    """As in training of rows of gate, up and down: the down rows' gradient wants all of h."""
    return backward(gate_columns=index(), up_columns=index(), emit_h=True)


def with_scores():
    return backward(segments=segments())


def gradient(k: int, width: int):
    """k slices, as many as lie together in memory once they are padded to whole 32 bytes."""
    columns = inputs()[0][:, : -(-k // 16) * 16].contiguous()
    other = inputs()[1][:, :width].contiguous()
    want = columns.double().t() @ other.double()
    return lambda: compact_gradient(columns, other), lambda got: [(got, want, 1e-4)]


def tables() -> list[Table]:
    """Those whose tile is in doubt; by their arithmetic the others reach 88 % of the copy, or do not matter."""
    case = "gated_backward silu bf16"
    rows = {"gate and up rows": (len(index()), H), "down rows": (max(1, H // 100), I)}
    return [
        Table(gated_kernels, "COLUMNS", f"{case} columns h", tiles(32, 64, most=16), with_columns),
        Table(gated_kernels, "SCORES", f"{case} scores", tiles(128, 256, most=16), with_scores),
        *(
            Table(
                slice_gradient,
                "CONFIGS",
                "slice_gradient compact bf16",
                products(k, width),
                functools.partial(gradient, k, width),
                f", {k} {name}",
            )
            for name, (k, width) in rows.items()
        ),
    ]


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
    os.environ["SLICETUNE_COLUMNS"] = "kernel"  # the kernel is tried, whichever way the engine takes
    name = "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name().lower())
    path = out / f"tune-{name}.json"
    all_tables, rows = tables(), []
    for i, (table, configs) in enumerate(zip(all_tables, fit(all_tables, part), strict=True)):
        share = (deadline - time.monotonic()) / (len(all_tables) - i)
        found = list(measured(table, configs, part, time.monotonic() + share))
        rows += found
        path.write_text(json.dumps({"part": part, "provenance": provenance(), "rows": rows}, indent=1) + "\n")
        print("\n".join(advice(table, found, len(configs), part)), flush=True)
    print(f"[tune] {path}")
    return int(any("error" in row for row in rows))


def advice(table: Table, found: list[dict[str, Any]], configs: int, part: str) -> list[str]:
    """What is printed of a table: its pinned configuration and, where another is worth a change, that line."""
    timed = sorted((row for row in found if "seconds" in row), key=lambda row: row["seconds"])
    wrong = [row["config"] for row in found if "error" in row]
    left = f", {configs - len(found)} left for want of time" if len(found) < configs else ""
    lines = [f"[tune] {table.place}: {len(timed)} timed{left}" + (f", WRONG: {wrong}" if wrong else "")]
    pinned = next((row for row in timed if row["config"] == repr(table.pinned(part))), None)
    if pinned is not None:
        lines.append(f"  pinned {pinned['config']}: {seconds_text(pinned['seconds'])}")
        if pinned["seconds"] > GAIN * timed[0]["seconds"]:
            lines.append(f'  write "{part}": {timed[0]["config"]}: {seconds_text(timed[0]["seconds"])}')
    return lines


def list_grid(part: str) -> int:
    all_tables = tables()
    for table, configs in zip(all_tables, fit(all_tables, part), strict=True):
        print(f"[tune] {table.place} on {part}: {len(configs)} of {len(table.candidates(part))} fit")
        for config in configs:
            print(f"  {config!r}" + ("  (pinned)" if config == table.pinned(part) else ""))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=cases.TARGETS, help="list what fits on this part; nothing is timed")
    parser.add_argument("--seconds", type=float, default=230, help="stop timing after this long")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of its JSON")
    options = parser.parse_args()
    if options.target or not GPU:
        return list_grid(options.target or "sm_90")
    return tune(architecture(torch.empty(0, device=DEVICE)), options.seconds, options.out)


if __name__ == "__main__":
    raise SystemExit(main())
