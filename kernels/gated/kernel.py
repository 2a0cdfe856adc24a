"""The Triton kernels of the gated activation, their launches and their pinned configurations; see op.py."""

import functools

from ..common import blocks
from ..common.activations import triton_value, triton_value_and_slope
from ..common.blocks import VARYING, block_of, load_gain, load_slots, store_columns, store_sums, tokens_of
from ..common.cases import AotCase
from ..common.dispatch import Tile, jit, tl

# Registers of a tile decide how many programs a multiprocessor holds, and those decide how much is in flight. Without
# scores 8x256 in 4 warps (two 16-byte loads a thread and tensor) takes 56 registers on sm_90; with the four
# accumulators 4x256 takes 90 where 8x256 takes 155. CDNA's warps are 64 wide: 8x256 for 16-byte accesses there.
# 256 tokens a program: a sentence is summed by one program and needs no fold. Compact columns need three offsets an
# element (183 registers at 8x256 with triton 3.6), and 32 tokens a program spread the cost of reading the slots.
FORWARD = {"default": Tile(8, 8, 256, 4), "interpret": Tile(8, 8, 32, 1)}
BACKWARD = {"default": Tile(8, 8, 256, 4), "interpret": Tile(16, 8, 32, 1)}
COLUMNS = {"default": Tile(32, 4, 256, 4), "gfx942": Tile(32, 8, 256, 4), "interpret": Tile(16, 8, 32, 1)}
SCORES = {"default": Tile(256, 4, 256, 4), "gfx942": Tile(256, 8, 256, 4), "interpret": Tile(16, 8, 32, 1)}


@jit(do_not_specialize=("tokens",))
def _forward_kernel(
    G, U, H, GAIN, ROUTE, tokens, width,
    ACTIVATION: tl.constexpr, FAST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    tile, cols = block_of(width, BLOCK_COLS)
    begin = tile * BLOCK_ROWS
    rows = tl.arange(0, BLOCK_ROWS)
    row_mask = begin + rows < tokens
    mask = row_mask[:, None] & (cols < width)[None, :]
    base = begin.to(tl.int64) * width
    offset = rows[:, None] * width + cols[None, :]
    g = tl.load(G + base + offset, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(U + base + offset, mask=mask, other=0.0).to(tl.float32)
    if GAIN is None:
        h = triton_value(g, ACTIVATION, FAST) * u
    else:
        c = load_gain(GAIN, ROUTE, begin + rows, cols, row_mask, mask, width)
        h = tl.where(c == 0, 0.0, triton_value(c * g, ACTIVATION, FAST) * (c * u))
    tl.store(H + base + offset, h.to(H.dtype.element_ty), mask=mask)


@jit
def _gradients(d, g, u, c, ACTIVATION: tl.constexpr, FAST: tl.constexpr):
    """dg, du, h and whether the unit is active, of a float32 block; all zero where c = 0."""
    if c is None:
        act, slope = triton_value_and_slope(g, ACTIVATION, FAST)
        return slope * u * d, act * d, act * u, g > 0
    else:
        act, slope = triton_value_and_slope(c * g, ACTIVATION, FAST)
        on = c != 0
        dg = tl.where(on, c * (slope * (c * u) * d), 0.0)
        du = tl.where(on, c * (act * d), 0.0)
        return dg, du, tl.where(on, act * (c * u), 0.0), c * g > 0


@jit(do_not_specialize=tuple(x for x in VARYING if x != "p_count"))
def _backward_kernel(
    DH, G, U, DG, DU, H, GAIN, ROUTE, TILES, SUMS, PARTIALS, GSLOT, USLOT, HSLOT, GCOPY, UCOPY, HCOPY,
    tokens, width, samples, partials, g_count, u_count, h_count,
    ACTIVATION: tl.constexpr, FAST: tl.constexpr, SIGNED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """DG, DU, H may be G, U, DH: a thread writes only the elements that it has read (a tile must not be smaller than
    the block of threads, which would share elements)."""
    tile, cols = block_of(width, BLOCK_COLS)
    begin, end = tokens_of(TILES, tile, tokens, ROWS)
    col_mask = cols < width
    g_slot = load_slots(GSLOT, cols, col_mask)
    u_slot = load_slots(USLOT, cols, col_mask)
    h_slot = load_slots(HSLOT, cols, col_mask)
    g_score = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    u_score = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    active = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    base = begin.to(tl.int64) * width
    rows = tl.arange(0, BLOCK_ROWS)
    for step in range(0, end - begin, BLOCK_ROWS):
        row = begin + step + rows
        row_mask = row < end
        mask = row_mask[:, None] & col_mask[None, :]
        offset = (step + rows)[:, None] * width + cols[None, :]
        d = tl.load(DH + base + offset, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(G + base + offset, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(U + base + offset, mask=mask, other=0.0).to(tl.float32)
        if GAIN is None:
            dg, du, h, on = _gradients(d, g, u, None, ACTIVATION, FAST)
        else:
            c = load_gain(GAIN, ROUTE, row, cols, row_mask, mask, width)
            dg, du, h, on = _gradients(d, g, u, c, ACTIVATION, FAST)
        tl.store(DG + base + offset, dg.to(DG.dtype.element_ty), mask=mask)
        tl.store(DU + base + offset, du.to(DU.dtype.element_ty), mask=mask)
        if H is not None:
            tl.store(H + base + offset, h.to(H.dtype.element_ty), mask=mask)
        store_columns(GCOPY, g_slot, begin, step + rows, mask, dg, g_count)
        store_columns(UCOPY, u_slot, begin, step + rows, mask, du, u_count)
        store_columns(HCOPY, h_slot, begin, step + rows, mask, h, h_count)
        if TILES is not None:
            # Masked elements were loaded as zeros and add nothing.
            g_score += g * dg if SIGNED else tl.abs(g * dg)
            u_score += u * du if SIGNED else tl.abs(u * du)
            active += tl.where(on, 1.0, 0.0)
            total += h
    if TILES is not None:
        accumulators = (g_score, u_score, active, total)
        store_sums(TILES, tile, SUMS, PARTIALS, accumulators, samples, partials, cols, width)


def launch_forward(gate, up, activation, gain, route, h) -> None:
    blocks.launch_forward(_forward_kernel, FORWARD, [gate, up, h], activation, gain, route)


def launch_backward(dh, gate, up, activation, gain, route, segments, signed, indices, dgate, dup, h, sums, columns):
    own, tables = [dh, gate, up, dgate, dup, h], (BACKWARD, COLUMNS, SCORES)
    asked = segments, signed, indices, sums, columns, [dgate, dup]
    blocks.launch_backward(_backward_kernel, tables, own, activation, gain, route, *asked)


def aot() -> list[AotCase]:
    """Every pinned configuration, with each dtype, activation and option that changes its registers."""
    forward = functools.partial(blocks.cases, _forward_kernel, "gated_forward", "G U H")
    backward = functools.partial(blocks.cases, _backward_kernel, "gated_backward", "DH G U DG DU")
    return [
        *forward(FORWARD, "bf16", "silu"),
        *forward(FORWARD, "fp32", "silu"),
        *forward(FORWARD, "bf16", "gelu_tanh", "gain"),
        *backward(BACKWARD, "bf16", "silu"),
        *backward(BACKWARD, "fp32", "silu"),
        *backward(COLUMNS, "bf16", "silu", "columns h"),
        *backward(COLUMNS, "bf16", "gelu_tanh", "gain columns h"),
        *backward(SCORES, "bf16", "silu", "scores"),
        *backward(SCORES, "bf16", "gelu_tanh", "scores"),
        *backward(SCORES, "bf16", "gelu", "scores"),
        *backward(SCORES, "fp16", "silu", "scores"),
        *backward(SCORES, "fp32", "silu", "scores"),
        *backward(SCORES, "bf16", "gelu_tanh", "scores gain columns h"),
    ]
