"""What the compile report compiles: pinned kernel configurations, a part each, and the sizes it counts with."""

from __future__ import annotations

import collections
from dataclasses import dataclass, field
from typing import Any

from .dispatch import Tile

TARGETS = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
# Bytes are counted at Llama-3.1-8B's FFN for a packed batch of 64 sentences of 128 tokens.
TOKENS, SAMPLES, INTERMEDIATE, HIDDEN = 8192, 64, 14336, 4096


@dataclass(frozen=True)
class AotCase:
    """One pinned configuration of one kernel; a kernel module's `aot()` returns a list of them."""

    name: str
    """Unique: "gated_backward silu bf16 scores"."""
    kernel: Any
    """The triton.jit function (unwrap autotune by .fn)."""
    signature: dict[str, str]
    """Run-time arguments: "*bf16", "*fp32", "*i32", "i32", "fp32"."""
    constexprs: dict[str, Any]
    """tl.constexpr arguments. Parameters in neither dict are pointers passed as None."""
    options: dict[str, int] = field(default_factory=lambda: {"num_warps": 4})
    divisible: tuple[str, ...] = ()
    """Integer arguments that are multiples of 16 at run time (widths); pointers always are."""
    targets: tuple[str, ...] = TARGETS
    """Parts that run this configuration."""
    bytes_moved: float = 0.0
    """Bytes of device memory read and written per element at Llama-3.1-8B shapes …"""
    bytes_minimum: float = 0.0
    """… and the least that its inputs and outputs allow."""
    element: str = "element of [T, I]"
    """What an element is, for the table."""
    streaming: bool = True
    """Memory-bound: 128-bit loads and stores are demanded."""
    reduces: bool = False
    """Writes sums alone, once in many tokens: of a streaming kernel then only the loads are held to 128 bits."""
    wgmma: bool = False
    """Holds a dot: wgmma is demanded on sm_90."""


def by_tile(table: dict[str, Tile]) -> list[tuple[Tile, tuple[str, ...]]]:
    """The distinct configurations of a pinned table, each with the parts that run it."""
    chosen: dict[Tile, list[str]] = collections.defaultdict(list)
    for target in TARGETS:
        chosen[table.get(target, table["default"])].append(target)
    return [(tile, tuple(targets)) for tile, targets in chosen.items()]
