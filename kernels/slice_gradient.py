"""Gradients of chosen rows or columns of a linear layer's weight, without the gradient of the others.

For y = x Wᵀ with W [out, in]: row r of W has gradient dy[:, r]ᵀ x, column c has x[:, c]ᵀ dy (kept as a row). Both are
one skinny product over the tokens, selectedᵀ @ other, accumulated in float32. It is split over the tokens so that the
GPU is full; the parts are added in their order, so a rerun gives the same bits.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .common.cases import AotCase
from .common.dispatch import INTERPRET, architecture, jit, on_device, runs_now, tl, use_triton

_TOKENS = 4096  # tokens upcast at once where the machine has no half-precision product with a float32 result
FOLD_BLOCK = 1024


@dataclass(frozen=True)
class Config:
    """A pinned tile: tokens × slices and tokens × width, accumulated in slices × width."""

    tokens: int
    slices: int
    width: int
    warps: int
    stages: int
    programs: int
    """Programs that the part holds at a time: one a multiprocessor or two, as registers and shared memory allow."""


# From the limits of each part (shared memory, registers) and ahead-of-time compilation; not yet measured on a GPU.
# Large tiles read each operand least often; small ones fill the chip where slices or tokens are few.
CONFIGS = {
    "sm_80": Config(64, 128, 128, 8, 4, 108),
    "sm_86": Config(32, 128, 128, 8, 4, 84),
    "sm_90": Config(64, 128, 256, 8, 4, 132),
    "sm_100": Config(64, 128, 128, 8, 4, 148),
    "gfx942": Config(32, 128, 128, 8, 2, 304),
    "interpret": Config(16, 16, 32, 4, 1, 4),
}
SMALL = {
    "sm_80": Config(64, 64, 128, 4, 3, 216),
    "sm_86": Config(32, 64, 64, 4, 4, 168),
    "sm_90": Config(32, 64, 256, 8, 4, 264),
    "sm_100": Config(64, 64, 128, 4, 4, 296),
    "gfx942": Config(32, 64, 64, 4, 2, 608),
    "interpret": Config(16, 16, 16, 4, 1, 8),
}
FALLBACK = "sm_86"  # the smallest shared memory of them: runs on parts that are not listed
SMALL_COST = 1.25
"""What an element of a small tile is reckoned to cost more: it reads its operands twice as often from the cache."""
START = 128
"""Tokens' worth of work that a program's start and end are reckoned as."""


def row_gradient(dy: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """Gradient of the rows `index` of W: dy[:, index]ᵀ x.

    dy: [tokens, out], x: [tokens, in], index: int64 [k] → float32 [k, in] (float64 for float64 inputs).
    """
    return _gradient(dy, x, index)


def column_gradient(dy: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """Gradient of the columns `index` of W, each as a row: x[:, index]ᵀ dy.

    dy: [tokens, out], x: [tokens, in], index: int64 [k] → float32 [k, out] (float64 for float64 inputs).
    """
    return _gradient(x, dy, index)


def compact_gradient(columns: Tensor, other: Tensor) -> Tensor:
    """The same from columns that lie together already (emitted by a backward kernel): columnsᵀ other.

    columns: [tokens, k], other: [tokens, n] → float32 [k, n]. Fastest when k is a multiple of 16, or when columns lie
    in a buffer whose rows are padded to that (outputs.buffer_of).
    """
    return _gradient(columns, other, None)


def selected_product_reference(a: Tensor, b: Tensor, index: Tensor | None) -> Tensor:
    """a[:, index]ᵀ b in plain torch: [tokens, m], [tokens, n], [k] → float32 [k, n], tokens added chunk by chunk."""
    if a.dtype in (torch.float64, torch.float32):
        return _select(a, index).t() @ b
    k = a.shape[1] if index is None else index.numel()
    out = torch.zeros(k, b.shape[1], dtype=torch.float32, device=a.device)
    for start in range(0, a.shape[0], _TOKENS):
        rows = slice(start, start + _TOKENS)
        out.addmm_(_select(a[rows], index).float().t(), b[rows].float())
    return out


def plan(k: int, n: int, config: Config) -> Literal["gather", "compact", "library"]:
    """Which way a half-precision product of k slices by width n takes on a GPU. Reckoned from bytes, not measured yet.

    gather: columns are picked inside the kernel. Each tile of the width picks them again, a 32-byte sector an element,
    so it pays for at most two tiles. compact: they are copied together once (4 bytes an element more), then the
    split kernel, which reads `other` once for each 128 slices. library: above 512 slices the vendor's product, which
    is no longer skinny.
    """
    if n <= 2 * config.width and k <= 512:
        return "gather"
    return "compact" if k <= 512 or torch.version.hip is not None else "library"


def _product(a: Tensor, b: Tensor, index: Tensor | None) -> Tensor:
    assert a.dim() == b.dim() == 2, (a.shape, b.shape)
    assert a.shape[0] == b.shape[0], (a.shape, b.shape)
    assert a.dtype == b.dtype, (a.dtype, b.dtype)
    k, n = a.shape[1] if index is None else index.numel(), b.shape[1]
    if a.shape[0] == 0 or k == 0 or n == 0:
        return torch.zeros(k, n, dtype=torch.promote_types(a.dtype, torch.float32), device=a.device)
    if not use_triton(a) or (a.dtype == torch.float32 and not INTERPRET):
        return selected_product_reference(a, b, index)
    part = architecture(a)
    part = part if part in CONFIGS else FALLBACK
    way = "compact" if index is None and k <= 512 else plan(k, n, CONFIGS[part])
    if way != "gather":
        # Rows of a multiple of 16 elements stay aligned; what the padding gives is cut off.
        a = _aligned(a) if index is None else a.index_select(1, F.pad(index, (0, -k % 16)))
        index = None
    if way == "library":
        return torch.mm(a.t(), b, out_dtype=torch.float32)[:k]
    a = a if a.stride(1) == 1 else a.contiguous()
    config, splits = chosen(part, a.shape[0], a.shape[1] if index is None else k, n)
    return _split_product(a, b.contiguous(), index, config, splits)[:k]


_product_op = torch.library.custom_op("slicetune::slice_gradient", _product, mutates_args=())


@_product_op.register_fake
def _(a: Tensor, b: Tensor, index: Tensor | None) -> Tensor:
    k = a.shape[1] if index is None else index.shape[0]
    return a.new_empty((k, b.shape[1]), dtype=torch.promote_types(a.dtype, torch.float32))


def _gradient(a: Tensor, b: Tensor, index: Tensor | None) -> Tensor:
    return _product(a, b, index) if runs_now(a, b, index) else _product_op(a, b, index)


def _aligned(a: Tensor) -> Tensor:
    """Columns [tokens, k] with k rounded up to 16: in the buffer that they lie in where it has the room, or copied."""
    k, (stride, inner), begin = a.shape[1], a.stride(), a.storage_offset()
    whole = k + -k % 16
    if inner == 1 and stride % 16 == 0 and begin % 16 == 0 and begin % stride + whole <= stride:
        return a.as_strided((a.shape[0], whole), (stride, 1), begin)
    return F.pad(a, (0, whole - k))


def _select(a: Tensor, index: Tensor | None) -> Tensor:
    return a if index is None else a.index_select(1, index)


@jit(do_not_specialize=("tokens", "k"))
def _product_kernel(
    a, b, index, out, tokens, k, n, stride, part,
    GATHER: tl.constexpr, UPCAST: tl.constexpr,
    TOKENS: tl.constexpr, SLICES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out[split] = a[part, index]ᵀ b[part]. Tiles of slices run side by side, so that they share b in the cache."""
    if not GATHER:
        k = k // 16 * 16  # it is padded to that: says that rows are whole vectors
    tiles = tl.cdiv(k, SLICES)
    rk = tl.program_id(0) % tiles * SLICES + tl.arange(0, SLICES)
    rn = tl.program_id(0) // tiles * WIDTH + tl.arange(0, WIDTH)
    rt = tl.arange(0, TOKENS)
    in_k, in_n = rk < k, rn < n
    columns = rk
    if GATHER:
        columns = tl.load(index + rk, mask=in_k, other=0).to(tl.int32)
    first = tl.program_id(1) * part
    left = tokens - first
    a_tile = rt[:, None] * stride + columns[None, :]
    b_tile = rt[:, None] * n + rn[None, :]
    a += first.to(tl.int64) * stride
    b += first.to(tl.int64) * n
    total = tl.zeros((SLICES, WIDTH), tl.float32)
    for t in range(0, part, TOKENS):
        inside = t + rt < left
        x = tl.load(a + a_tile, mask=inside[:, None] & in_k[None, :], other=0.0)
        y = tl.load(b + b_tile, mask=inside[:, None] & in_n[None, :], other=0.0)
        if UPCAST:  # the interpreter's bfloat16 products are wrong
            x, y = x.to(tl.float32), y.to(tl.float32)
        total = tl.dot(tl.trans(x), y, total, input_precision="ieee")
        a += TOKENS * stride
        b += TOKENS * n
    out += tl.program_id(1).to(tl.int64) * k * n
    tl.store(out + rk.to(tl.int64)[:, None] * n + rn[None, :], total, mask=in_k[:, None] & in_n[None, :])


@jit(do_not_specialize=("splits",))
def _fold_kernel(parts, out, splits, count, BLOCK: tl.constexpr):
    """out = parts[0] + parts[1] + …, in this order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    total = tl.load(parts + i, mask=mask, other=0.0)
    for _ in range(1, splits):
        parts += count
        total += tl.load(parts + i, mask=mask, other=0.0)
    tl.store(out + i, total, mask=mask)


def splits_of(tokens: int, tiles: int, config: Config) -> int:
    """How many parts the tokens are cut into: as many as run at a time, and two tiles of tokens each at least."""
    return max(1, min(config.programs // tiles, tokens // (2 * config.tokens)))


@lru_cache(maxsize=4096)
def chosen(part: str, tokens: int, k: int, n: int) -> tuple[Config, int]:
    """The tile for k slices by width n on a part, and the parts that the tokens are cut into.

    The one whose busiest multiprocessor has least to do, reckoned from shapes: the same on every rank and in every run.
    """

    def load(choice: tuple[Config, int]) -> float:
        config, splits = choice
        programs = -(-k // config.slices) * -(-n // config.width) * splits
        each = config.slices * config.width * (tokens / splits + START)
        return -(-programs // CONFIGS[part].programs) * each * (1 if config is CONFIGS[part] else SMALL_COST)

    found = []
    for config in (CONFIGS[part], SMALL[part]):
        tiles = -(-k // config.slices) * -(-n // config.width)
        found.append((config, splits_of(tokens, tiles, config)))
    return min(found, key=load)


def _split_product(a: Tensor, b: Tensor, index: Tensor | None, config: Config, splits: int) -> Tensor:
    tokens, n = b.shape
    k = a.shape[1] if index is None else index.numel()
    tiles = -(-k // config.slices) * -(-n // config.width)
    part = -(-tokens // (splits * config.tokens)) * config.tokens
    splits = -(-tokens // part)
    parts = torch.empty(splits, k, n, dtype=torch.float32, device=a.device)
    with on_device(a):
        _product_kernel[(tiles, splits)](
            a, b, index, parts, tokens, k, n, a.stride(0), part,
            index is not None, INTERPRET, config.tokens, config.slices, config.width,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        if splits == 1:
            return parts[0]
        out = torch.empty(k, n, dtype=torch.float32, device=a.device)
        _fold_kernel[(-(-k * n // FOLD_BLOCK),)](parts, out, splits, k * n, FOLD_BLOCK, num_warps=4)
    return out


def aot() -> list[AotCase]:
    """Both products on each part's own tile, and the fold. Bytes an element of `other` are for 143 slices of 4096."""
    fold = AotCase(
        name="slice_gradient fold",
        kernel=_fold_kernel,
        signature={"parts": "*fp32", "out": "*fp32", "splits": "i32", "count": "i32"},
        constexprs={"BLOCK": FOLD_BLOCK},
        divisible=("count",),
        bytes_moved=5 * 4,
        bytes_minimum=5 * 4,
        element="gradient element (4 parts)",
    )
    return [fold] + [
        _product_case(part, table[part], dtype, gather, size)
        for size, table in (("", CONFIGS), (" small", SMALL))
        for part in CONFIGS
        if part != "interpret"
        for dtype in ("bf16", "fp16")
        for gather in (False, True)
    ]


def _product_case(part: str, config: Config, dtype: str, gather: bool, size: str) -> AotCase:
    pointers = {"a": f"*{dtype}", "b": f"*{dtype}", "out": "*fp32", **({"index": "*i64"} if gather else {})}
    sizes = dict.fromkeys(("tokens", "k", "n", "stride", "part"), "i32")
    tile = {"TOKENS": config.tokens, "SLICES": config.slices, "WIDTH": config.width}
    k, width = 143, 4096
    # Tiles of slices read `other` again, tiles of the width the columns, or a sector for each of their elements.
    again = -(-k // config.slices) * 2 + -(-width // config.width) * (32 if gather else 2) * k / width
    return AotCase(
        name=f"slice_gradient {'gather' if gather else 'compact'} {dtype}{size}",
        kernel=_product_kernel,
        signature={**pointers, **sizes},
        constexprs={"GATHER": gather, "UPCAST": False, **tile, **({} if gather else {"index": None})},
        options={"num_warps": config.warps, "num_stages": config.stages},
        divisible=("n", "stride", "part"),
        targets=(part,),
        bytes_moved=again,
        bytes_minimum=2 + 2 * k / width,
        element="element of other [T, n]",
        streaming=False,
        wgmma=part == "sm_90",
    )
