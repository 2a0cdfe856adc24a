"""AdamW over the compact slices of a whole model in one launch, with the scatter into the weights they belong to.

A table of pointers (one row a slice) and a list of tiles (which slice, which 1024 elements of it) go to the device; a
program takes one tile. Slices of one storage layout share a launch: a Llama in bfloat16 has one. The formula, the
8-bit moments and the random bits are those of `adamw_reference`, operation by operation.
"""

from functools import lru_cache

import torch
from torch import Tensor

from .adamw_reference import BLOCK, M_TOP, V_TOP, Slice, adamw_reference
from .compile import TARGETS, AotCase
from .dispatch import architecture, jit, on_device, tl, use_triton

ROWS = 4  # a tile is 4 blocks of 256: 8 neighbouring elements a thread, two 128-bit accesses in float32
TILE = ROWS * BLOCK
FIELDS, HYPER = 15, 8  # columns of the two tables


@torch.no_grad()
def adamw_(slices: list[Slice], grad_scale: Tensor | None = None) -> None:
    """One AdamW step (decoupled weight decay) over all slices, in place, and the new values into their weights.

    grad_scale: one-element tensor on the slices' device that multiplies every gradient (loss scale, clip factor).
    """
    slow: list[Slice] = []
    launches: dict[tuple, list[tuple[Slice, list[int]]]] = {}
    for s in slices:
        if s.param.numel() == 0:
            continue
        if use_triton(s.param):
            row = _row(s)
            launches.setdefault(_layout(s, row), []).append((s, row))
        else:
            slow.append(s)
    adamw_reference(slow, grad_scale)
    for layout, members in launches.items():
        _launch(layout, [s for s, _ in members], [row for _, row in members], grad_scale)


def _row(s: Slice) -> list[int]:
    """One row of the pointer table; zero where a slice has no such tensor."""
    numel = s.param.numel()
    assert numel < 2**31 - TILE, f"{numel} elements in one parameter: the kernel counts in 32 bits"
    row = [s.param.data_ptr(), s.grad.data_ptr(), s.exp_avg.data_ptr(), s.exp_avg_sq.data_ptr(), 0, 0, 0, 0, 0]
    row += [numel, numel, 0, s.axis, s.key & 0xFFFFFFFF, s.key >> 32]
    if s.master is not None:
        row[4] = s.master.data_ptr()
    if s.exp_avg_absmax is not None:
        row[5], row[6] = s.exp_avg_absmax.data_ptr(), s.exp_avg_sq_absmax.data_ptr()
    if s.weight is not None:
        assert s.weight.stride(-1) == 1, f"weight of strides {s.weight.stride()}: elements of a row must be neighbours"
        assert s.weight.device == s.index.device == s.param.device, "a slice and its weight are on different devices"
        # A bias is a weight whose rows have one element.
        row[7], row[8], row[10], row[11] = s.weight.data_ptr(), s.index.data_ptr(), _width(s), s.weight.stride(0)
    return row


def _width(s: Slice) -> int:
    return s.param.numel() // s.param.shape[0]


def _layout(s: Slice, row: list[int]) -> tuple:
    """What must be equal in one launch: device, types, options, and how many neighbouring elements lie together.

    aligned: 16 elements always do, so that accesses are vectors; whole: a block of 256 lies in one row or column.
    """
    aligned = all(x % 16 == 0 for x in (*row[:5], row[7], *row[9:12]))
    weight = None if s.weight is None else s.weight.dtype
    whole = aligned and s.weight is not None and row[10] % BLOCK == 0
    kinds = s.param.device, s.param.dtype, s.grad.dtype, weight
    return *kinds, s.master is not None, s.exp_avg_absmax is not None, s.rounds, aligned, whole


def _hyper(s: Slice) -> list[float]:
    decay = 1 - s.lr * s.weight_decay
    return [decay, 1 - s.beta1, s.beta2, 1 - s.beta2, s.step_size, s.correction, s.eps, 0.0]


@lru_cache(maxsize=64)
def _tiles(numels: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [programs, 2]: slice and tile number of each program."""
    counts = torch.tensor([-(-n // TILE) for n in numels])
    owner = torch.repeat_interleave(torch.arange(len(numels)), counts)
    first = torch.cumsum(counts, 0) - counts
    return torch.stack([owner, torch.arange(owner.numel()) - first[owner]], 1).to(torch.int32).to(device)


def _upload(rows: list, dtype: torch.dtype, device: torch.device) -> Tensor:
    table = torch.tensor(rows, dtype=dtype)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def _launch(layout: tuple, slices: list[Slice], rows: list[list[int]], grad_scale: Tensor | None) -> None:
    device, *options = layout
    tiles = _tiles(tuple(row[9] for row in rows), device)
    table = _upload(rows, torch.int64, device)
    hyper = _upload([_hyper(s) for s in slices], torch.float32, device)
    scale = None if grad_scale is None else grad_scale.to(device, torch.float32)
    warps = _warps(architecture(slices[0].param))
    with on_device(slices[0].param):
        _adamw_kernel[(tiles.shape[0],)](table, hyper, tiles, scale, **_constants(*options), num_warps=warps)
    # A graph that saved these and is still to run backward must raise, as after torch's own in-place operations.
    written = (t for s in slices for t in (s.param, s.weight) if t is not None)
    torch.autograd.graph.increment_version(list(written))


def _warps(part: str) -> int:
    """128 threads a program: AMD's warps have 64."""
    return 2 if part.startswith("gfx") else 4


def _constants(param, grad, weight, master: bool, quantized: bool, rounds: bool, aligned: bool, whole: bool) -> dict:
    names = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, None: None}
    return {
        **{"PARAM": names[param], "GRAD": names[grad], "WEIGHT": names[weight]},
        **{"MASTER": master, "QUANTIZED": quantized, "ROUNDS": rounds, "ALIGNED": aligned, "WHOLE": whole},
        **{"ROWS": ROWS, "BLOCK": BLOCK, "FIELDS": FIELDS, "HYPER": HYPER, "M_TOP": M_TOP, "V_TOP": V_TOP},
    }


@jit
def _pointer(row, field: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row + field).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@jit
def _uniform(bits):
    return (bits & 0xFFFF).to(tl.float32) * (1 / 65536)


@jit
def _load_blocks(row, means, squares, offsets, block, mask, inside, M_TOP: tl.constexpr, V_TOP: tl.constexpr):
    """Both moments from their 8-bit codes; see adamw_reference.read_moments."""
    code = tl.load(means + offsets, mask=mask, other=0).to(tl.float32)
    top = tl.load(tl.load(row + 5).to(tl.pointer_type(tl.float32)) + block, mask=inside, other=0.0)
    mean = code * tl.abs(code) * (1 / (M_TOP * M_TOP)) * top[:, None]
    code = tl.load(squares + offsets, mask=mask, other=0).to(tl.float32)
    top = tl.load(tl.load(row + 6).to(tl.pointer_type(tl.float32)) + block, mask=inside, other=0.0)
    square = (code * code) * (code * code) * (1 / (V_TOP * V_TOP * V_TOP * V_TOP)) * top[:, None]
    return mean, square


@jit
def _store_blocks(
    row, mean, square, means, squares, bits, offsets, block, mask, inside, M_TOP: tl.constexpr, V_TOP: tl.constexpr
):
    """8-bit codes and the absolute maxima of their blocks of 256; see adamw_reference.write_moments."""
    mean_top = tl.max(tl.abs(mean), 1)
    square_top = tl.max(square, 1)
    tl.store(tl.load(row + 5).to(tl.pointer_type(tl.float32)) + block, mean_top, mask=inside)
    tl.store(tl.load(row + 6).to(tl.pointer_type(tl.float32)) + block, square_top, mask=inside)
    x = tl.div_rn(tl.abs(mean), tl.where(mean_top > 0, mean_top, 1.0)[:, None]) * (M_TOP * M_TOP)
    low = tl.floor(tl.sqrt_rn(x))
    up = x - low * low > _uniform(bits) * (2 * low + 1)
    code = tl.minimum(low + up.to(tl.float32), M_TOP)
    tl.store(means + offsets, tl.where(mean < 0, -code, code).to(tl.int8), mask=mask)
    x = tl.div_rn(square, tl.where(square_top > 0, square_top, 1.0)[:, None]) * (V_TOP * V_TOP * V_TOP * V_TOP)
    low = tl.floor(tl.sqrt_rn(tl.sqrt_rn(x)))
    high = low + 1
    below, above = (low * low) * (low * low), (high * high) * (high * high)
    up = x - below > _uniform(bits >> 16) * (above - below)
    code = tl.minimum(low + up.to(tl.float32), V_TOP)
    tl.store(squares + offsets, tl.maximum(code, (square > 0).to(tl.float32)).to(tl.uint8), mask=mask)


@jit
def _scatter(
    value, row, offsets, block, mask, inside,
    WEIGHT: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The tile's values into the rows or columns of the weight that the slice names."""
    weight = _pointer(row, 7, WEIGHT, ALIGNED)
    index = tl.load(row + 8).to(tl.pointer_type(tl.int64))
    width, stride = tl.load(row + 10).to(tl.int32), tl.load(row + 11)
    if ALIGNED:
        width, stride = tl.multiple_of(width, 16), tl.multiple_of(stride, 16)
    if WHOLE:
        own = tl.load(index + block * BLOCK // width, mask=inside, other=0)[:, None]
    else:
        own = tl.load(index + offsets // width, mask=mask, other=0)
    inner = offsets % width
    if tl.load(row + 12) == 0:
        tl.store(weight + own * stride + inner, value, mask=mask)
    else:
        tl.store(weight + inner.to(tl.int64) * stride + own, value, mask=mask)


@jit
def _adamw_kernel(
    table, hyper, tiles, grad_scale,
    PARAM: tl.constexpr, GRAD: tl.constexpr, WEIGHT: tl.constexpr,
    MASTER: tl.constexpr, QUANTIZED: tl.constexpr, ROUNDS: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, FIELDS: tl.constexpr, HYPER: tl.constexpr,
    M_TOP: tl.constexpr, V_TOP: tl.constexpr,
):  # fmt: skip
    owner = tl.load(tiles + 2 * tl.program_id(0))
    row, h = table + owner * FIELDS, hyper + owner * HYPER
    numel = tl.load(row + 9).to(tl.int32)
    if ALIGNED:
        numel = tl.multiple_of(numel, 16)
    block = tl.load(tiles + 2 * tl.program_id(0) + 1) * ROWS + tl.arange(0, ROWS)
    offsets = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask, inside = offsets < numel, block * BLOCK < numel

    gradient = tl.load(_pointer(row, 1, GRAD, ALIGNED) + offsets, mask=mask, other=0.0).to(tl.float32)
    if grad_scale is not None:
        gradient = gradient * tl.load(grad_scale)
    if QUANTIZED:
        means, squares = _pointer(row, 2, tl.int8, ALIGNED), _pointer(row, 3, tl.uint8, ALIGNED)
        mean, square = _load_blocks(row, means, squares, offsets, block, mask, inside, M_TOP, V_TOP)
    else:
        means, squares = _pointer(row, 2, tl.float32, ALIGNED), _pointer(row, 3, tl.float32, ALIGNED)
        mean = tl.load(means + offsets, mask=mask, other=0.0)
        square = tl.load(squares + offsets, mask=mask, other=0.0)
    param, master = _pointer(row, 0, PARAM, ALIGNED), _pointer(row, 4, tl.float32, ALIGNED)
    if MASTER:
        value = tl.load(master + offsets, mask=mask, other=0.0)
    else:
        value = tl.load(param + offsets, mask=mask, other=0.0).to(tl.float32)

    value = value * tl.load(h)
    mean = mean + tl.load(h + 1) * (gradient - mean)
    square = square * tl.load(h + 2) + tl.load(h + 3) * gradient * gradient
    denominator = tl.div_rn(tl.sqrt_rn(square), tl.load(h + 5)) + tl.load(h + 6)
    value = value - tl.load(h + 4) * tl.div_rn(mean, denominator)

    if QUANTIZED or ROUNDS:
        low, high = tl.load(row + 13).to(tl.uint32), tl.load(row + 14).to(tl.uint32)
        bits = _mix(_mix(offsets.to(tl.uint32) ^ low) + high)
    if QUANTIZED:
        again = _mix(bits + 0x9E3779B9)
        _store_blocks(row, mean, square, means, squares, again, offsets, block, mask, inside, M_TOP, V_TOP)
    else:
        tl.store(means + offsets, mean, mask=mask)
        tl.store(squares + offsets, square, mask=mask)
    if ROUNDS:
        # Cut to the upper half here, so that the conversion below is exact whichever way it rounds.
        raw = (value.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)) & 0xFFFF0000
        value = tl.where(tl.abs(value) < float("inf"), raw.to(tl.float32, bitcast=True), value)
    if MASTER:
        tl.store(master + offsets, value, mask=mask)
    tl.store(param + offsets, value.to(PARAM), mask=mask)
    if WEIGHT is not None:
        _scatter(value.to(PARAM).to(WEIGHT), row, offsets, block, mask, inside, WEIGHT, ALIGNED, WHOLE, BLOCK)


def aot() -> list[AotCase]:
    """The layouts that training meets: float32 slices of a bfloat16 model, its flat partitions, 8-bit, no master."""
    bf16, fp32 = torch.bfloat16, torch.float32
    layouts = {  # param, grad, weight, master, quantized, rounds, aligned, whole; bytes an element
        "adamw fp32 into bf16": ((fp32, fp32, bf16, False, False, False, True, True), 30),
        "adamw fp32 into bf16, narrow": ((fp32, fp32, bf16, False, False, False, True, False), 30),
        "adamw fp32": ((fp32, fp32, None, False, False, False, True, True), 28),
        "adamw bf16 master": ((bf16, bf16, bf16, True, False, False, True, True), 30),
        "adamw fp32 8-bit": ((fp32, fp32, bf16, False, True, False, True, True), 18 + 16 / BLOCK),
        "adamw bf16 8-bit rounded": ((bf16, bf16, bf16, False, True, True, True, True), 12 + 16 / BLOCK),
        "adamw bf16 rounded": ((bf16, bf16, bf16, False, False, True, True, True), 24),
        "adamw fp32 into bf16, odd": ((fp32, fp32, bf16, False, False, False, False, False), 30),
    }
    return [
        AotCase(
            name=name,
            kernel=_adamw_kernel,
            signature={"table": "*i64", "hyper": "*fp32", "tiles": "*i32", "grad_scale": "*fp32"},
            constexprs=_constants(*layout),
            options={"num_warps": warps},
            targets=tuple(part for part in TARGETS if _warps(part) == warps),
            bytes_moved=moved,
            bytes_minimum=moved,
            element="slice element",
            streaming=layout[-2],
        )
        for name, (layout, moved) in layouts.items()
        for warps in (4, 2)
    ]
