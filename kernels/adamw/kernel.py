"""The Triton kernels of AdamW over slices, and their configurations; see op.py.

A program takes one tile: 1024 elements of one slice. `table` has a row of pointers and sizes for each slice, `moving`
what changes from step to step: the gradients' pointers, then the rounding keys, and `hyper` the rates. All that a
program reads is read before its first store: a store may alias a later load for all that the compiler knows, which
would then wait for it.
"""

import torch

from ..common.cases import TARGETS, AotCase
from ..common.dispatch import jit, tl
from .reference import BLOCK, M_TOP, V_TOP

ROWS = 4  # a tile is 4 blocks of 256: 8 neighbouring elements a thread, two 128-bit accesses in float32
TILE = ROWS * BLOCK
FIELDS, HYPER = 13, 8  # columns of `table` and of `hyper`


# Columns of `table`: param, exp_avg, exp_avg_sq, master, the absmax of both, weight, index, numel, width, stride of the
# weight, axis, row of `hyper`.


def warps_of(part: str) -> int:
    """128 threads a program: AMD's warps have 64."""
    return 2 if part.startswith("gfx") else 4


def constants(param, grad, weight, master: bool, quantized: bool, rounds: bool, aligned: bool, whole: bool) -> dict:
    """The kernel's constants for one storage layout."""
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
def _tops(row, field: tl.constexpr):
    """Where the absolute maxima of 8-bit moments lie."""
    return tl.load(row + field).to(tl.pointer_type(tl.float32))


@jit
def _load_blocks(
    means, squares, m_tops, v_tops, offsets, block, mask, inside, M_TOP: tl.constexpr, V_TOP: tl.constexpr
):
    """Both moments from their 8-bit codes; see adamw_reference.read_moments."""
    code = tl.load(means + offsets, mask=mask, other=0).to(tl.float32)
    top = tl.load(m_tops + block, mask=inside, other=0.0)
    mean = code * tl.abs(code) * (1 / (M_TOP * M_TOP)) * top[:, None]
    code = tl.load(squares + offsets, mask=mask, other=0).to(tl.float32)
    top = tl.load(v_tops + block, mask=inside, other=0.0)
    square = (code * code) * (code * code) * (1 / (V_TOP * V_TOP * V_TOP * V_TOP)) * top[:, None]
    return mean, square


@jit
def _store_blocks(
    mean, square, means, squares, m_tops, v_tops, bits, offsets, block, mask, inside,
    M_TOP: tl.constexpr, V_TOP: tl.constexpr,
):  # fmt: skip
    """8-bit codes and the absolute maxima of their blocks of 256; see adamw_reference.write_moments."""
    mean_top = tl.max(tl.abs(mean), 1)
    square_top = tl.max(square, 1)
    tl.store(m_tops + block, mean_top, mask=inside)
    tl.store(v_tops + block, square_top, mask=inside)
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
def _tile_of(table, tiles, ROWS: tl.constexpr, BLOCK: tl.constexpr, FIELDS: tl.constexpr, ALIGNED: tl.constexpr):
    """A program's slice, its row of the table, and its blocks and elements with their masks."""
    owner = tl.load(tiles + 2 * tl.program_id(0))
    row = table + owner * FIELDS
    numel = tl.load(row + 8).to(tl.int32)
    if ALIGNED:
        numel = tl.multiple_of(numel, 16)
    block = tl.load(tiles + 2 * tl.program_id(0) + 1) * ROWS + tl.arange(0, ROWS)
    offsets = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    return owner, row, block, offsets, offsets < numel, block * BLOCK < numel


@jit
def _places(
    row, offsets, block, mask, inside,
    WEIGHT: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weight, the tile's slices and elements in it, its stride, and whether slices are columns."""
    weight = _pointer(row, 6, WEIGHT, ALIGNED)
    index = tl.load(row + 7).to(tl.pointer_type(tl.int64))
    width, stride = tl.load(row + 9).to(tl.int32), tl.load(row + 10)
    if ALIGNED:
        width, stride = tl.multiple_of(width, 16), tl.multiple_of(stride, 16)
    if WHOLE:
        own = tl.load(index + block * BLOCK // width, mask=inside, other=0)[:, None]
    else:
        own = tl.load(index + offsets // width, mask=mask, other=0)
    return weight, own, offsets % width, stride, tl.load(row + 11)


@jit
def _scatter(value, weight, own, inner, stride, axis, mask):
    """The tile's values into the rows or columns of the weight that the slice names."""
    if axis == 0:
        tl.store(weight + own * stride + inner, value, mask=mask)
    else:
        tl.store(weight + inner.to(tl.int64) * stride + own, value, mask=mask)


@jit
def write_kernel(
    table, tiles, PARAM: tl.constexpr, WEIGHT: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """Slices into the weights that they are of: what a step does last, alone."""
    _, row, block, offsets, mask, inside = _tile_of(table, tiles, ROWS, BLOCK, FIELDS, ALIGNED)
    value = tl.load(_pointer(row, 0, PARAM, ALIGNED) + offsets, mask=mask, other=0.0)
    weight, own, inner, stride, axis = _places(row, offsets, block, mask, inside, WEIGHT, ALIGNED, WHOLE, BLOCK)
    _scatter(value.to(WEIGHT), weight, own, inner, stride, axis, mask)


@jit(do_not_specialize=("count",))
def adamw_kernel(
    table, tiles, moving, hyper, grad_scale, count,
    PARAM: tl.constexpr, GRAD: tl.constexpr, WEIGHT: tl.constexpr,
    MASTER: tl.constexpr, QUANTIZED: tl.constexpr, ROUNDS: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, FIELDS: tl.constexpr, HYPER: tl.constexpr,
    M_TOP: tl.constexpr, V_TOP: tl.constexpr,
):  # fmt: skip
    owner, row, block, offsets, mask, inside = _tile_of(table, tiles, ROWS, BLOCK, FIELDS, ALIGNED)
    gradients = _pointer(moving, owner, GRAD, ALIGNED)
    gradient = tl.load(gradients + offsets, mask=mask, other=0.0).to(tl.float32)
    param = _pointer(row, 0, PARAM, ALIGNED)
    if QUANTIZED:
        means, squares = _pointer(row, 1, tl.int8, ALIGNED), _pointer(row, 2, tl.uint8, ALIGNED)
        m_tops, v_tops = _tops(row, 4), _tops(row, 5)
        mean, square = _load_blocks(means, squares, m_tops, v_tops, offsets, block, mask, inside, M_TOP, V_TOP)
    else:
        means, squares = _pointer(row, 1, tl.float32, ALIGNED), _pointer(row, 2, tl.float32, ALIGNED)
        mean = tl.load(means + offsets, mask=mask, other=0.0)
        square = tl.load(squares + offsets, mask=mask, other=0.0)
    if MASTER:
        master = _pointer(row, 3, tl.float32, ALIGNED)
        value = tl.load(master + offsets, mask=mask, other=0.0)
    else:
        value = tl.load(param + offsets, mask=mask, other=0.0).to(tl.float32)
    if WEIGHT is not None:
        weight, own, inner, stride, axis = _places(row, offsets, block, mask, inside, WEIGHT, ALIGNED, WHOLE, BLOCK)
    h = hyper + tl.load(row + 12) * HYPER
    decay, gain, keep, share = tl.load(h), tl.load(h + 1), tl.load(h + 2), tl.load(h + 3)
    size, correction, eps = tl.load(h + 4), tl.load(h + 5), tl.load(h + 6)
    if QUANTIZED or ROUNDS:
        key = tl.load(moving + count + owner)
        low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    if grad_scale is not None:
        gradient = gradient * tl.load(grad_scale)

    value = value * decay
    mean = mean + gain * (gradient - mean)
    square = square * keep + share * gradient * gradient
    denominator = tl.div_rn(tl.sqrt_rn(square), correction) + eps
    value = value - size * tl.div_rn(mean, denominator)

    if QUANTIZED or ROUNDS:
        bits = _mix(_mix(offsets.to(tl.uint32) ^ low) + high)
    if QUANTIZED:
        again = _mix(bits + 0x9E3779B9)
        _store_blocks(mean, square, means, squares, m_tops, v_tops, again, offsets, block, mask, inside, M_TOP, V_TOP)
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
        _scatter(value.to(PARAM).to(WEIGHT), weight, own, inner, stride, axis, mask)


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
    pointers = {"table": "*i64", "tiles": "*i32"}
    rates = {"moving": "*i64", "hyper": "*fp32", "grad_scale": "*fp32", "count": "i32"}
    steps = [
        AotCase(
            name=name,
            kernel=adamw_kernel,
            signature=pointers | rates,
            constexprs=constants(*layout),
            options={"num_warps": warps},
            targets=tuple(part for part in TARGETS if warps_of(part) == warps),
            bytes_moved=moved,
            bytes_minimum=moved,
            element="slice element",
            streaming=layout[-2],
        )
        for name, (layout, moved) in layouts.items()
        for warps in (4, 2)
    ]
    layout = constants(bf16, bf16, bf16, False, False, False, True, True)
    writes = [
        AotCase(
            name="slices into their weights",
            kernel=write_kernel,
            signature=pointers,
            constexprs={x: layout[x] for x in (p.name for p in write_kernel.params) if x in layout},
            options={"num_warps": warps},
            targets=tuple(part for part in TARGETS if warps_of(part) == warps),
            bytes_moved=4,
            bytes_minimum=4,
            element="slice element",
        )
        for warps in (4, 2)
    ]
    return steps + writes
