"""The Triton kernels of the plain activation, their launches and their pinned configurations; see op.py."""

import functools

from ..common import blocks
from ..common.activations import triton_value, triton_value_and_slope
from ..common.blocks import VARYING, block_of, load_gain, load_slots, store_columns, store_sums, tokens_of
from ..common.cases import AotCase
from ..common.dispatch import Tile, jit, tl

# As in gated/kernel.py, with one tensor less to hold.
FORWARD = {"default": Tile(8, 8, 256, 4), "interpret": Tile(8, 8, 32, 1)}
BACKWARD = {"default": Tile(8, 8, 256, 4), "interpret": Tile(16, 8, 32, 1)}
COLUMNS = {"default": Tile(32, 4, 256, 4), "gfx942": Tile(32, 8, 256, 4), "interpret": Tile(16, 8, 32, 1)}
SCORES = {"default": Tile(256, 4, 256, 4), "gfx942": Tile(256, 8, 256, 4), "interpret": Tile(16, 8, 32, 1)}


@jit(do_not_specialize=("tokens",))
def _forward_kernel(
    P, H, BIAS, GAIN, ROUTE, tokens, width,
    ACTIVATION: tl.constexpr, FAST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    tile, cols = block_of(width, BLOCK_COLS)
    begin = tile * BLOCK_ROWS
    rows = tl.arange(0, BLOCK_ROWS)
    row_mask = begin + rows < tokens
    mask = row_mask[:, None] & (cols < width)[None, :]
    base = begin.to(tl.int64) * width
    offset = rows[:, None] * width + cols[None, :]
    z = tl.load(P + base + offset, mask=mask, other=0.0).to(tl.float32)
    if GAIN is not None:
        c = load_gain(GAIN, ROUTE, begin + rows, cols, row_mask, mask, width)
        z = c * z
    if BIAS is not None:
        z += tl.load(BIAS + cols, mask=cols < width, other=0.0).to(tl.float32)[None, :]
    h = triton_value(z, ACTIVATION, FAST)
    if GAIN is not None:
        h = tl.where(c == 0, 0.0, h)
    tl.store(H + base + offset, h.to(H.dtype.element_ty), mask=mask)


@jit(do_not_specialize=tuple(x for x in VARYING if x not in ("g_count", "u_count")))
def _backward_kernel(
    DH, P, DP, H, BIAS, GAIN, ROUTE, TILES, SUMS, PARTIALS, PSLOT, HSLOT, PCOPY, HCOPY,
    tokens, width, samples, partials, p_count, h_count,
    ACTIVATION: tl.constexpr, FAST: tl.constexpr, SIGNED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    tile, cols = block_of(width, BLOCK_COLS)
    begin, end = tokens_of(TILES, tile, tokens, ROWS)
    col_mask = cols < width
    if BIAS is not None:
        bias = tl.load(BIAS + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    p_slot = load_slots(PSLOT, cols, col_mask)
    h_slot = load_slots(HSLOT, cols, col_mask)
    score = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    unit = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
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
        z = tl.load(P + base + offset, mask=mask, other=0.0).to(tl.float32)
        # With a bias a masked element is not zero by itself, so `on` carries the mask into every sum.
        on = mask
        if GAIN is not None:
            c = load_gain(GAIN, ROUTE, row, cols, row_mask, mask, width)
            on = mask & (c != 0)
            z = c * z
        if BIAS is not None:
            z += bias
        # With sums ptxas spills eight bytes over the fast form, on some parts.
        h, slope = triton_value_and_slope(z, ACTIVATION, FAST and TILES is None)
        h = tl.where(on, h, 0.0)
        dz = tl.where(on, slope * d, 0.0)
        dp = dz
        if GAIN is not None:
            dp = c * dz
        tl.store(DP + base + offset, dp.to(DP.dtype.element_ty), mask=mask)
        if H is not None:
            tl.store(H + base + offset, h.to(H.dtype.element_ty), mask=mask)
        store_columns(PCOPY, p_slot, begin, step + rows, mask, dp, p_count)
        store_columns(HCOPY, h_slot, begin, step + rows, mask, h, h_count)
        if TILES is not None:
            score += z * dz if SIGNED else tl.abs(z * dz)
            unit += h * d if SIGNED else tl.abs(h * d)
            active += tl.where(on & (z > 0), 1.0, 0.0)
            total += h
    if TILES is not None:
        accumulators = (score, unit, active, total)
        store_sums(TILES, tile, SUMS, PARTIALS, accumulators, samples, partials, cols, width)


def launch_forward(pre, activation, bias, gain, route, h) -> None:
    blocks.launch_forward(_forward_kernel, FORWARD, [pre, h, bias], activation, gain, route)


def launch_backward(dh, pre, activation, bias, gain, route, segments, signed, indices, dpre, h, sums, columns):
    own, tables = [dh, pre, dpre, h, bias], (BACKWARD, COLUMNS, SCORES)
    asked = segments, signed, indices, sums, columns, [dpre]
    blocks.launch_backward(_backward_kernel, tables, own, activation, gain, route, *asked)


def aot() -> list[AotCase]:
    """Every pinned configuration: gelu_tanh in each dtype, each option that changes its registers, and ReLUs."""
    forward = functools.partial(blocks.cases, _forward_kernel, "plain_forward", "P H BIAS")
    backward = functools.partial(blocks.cases, _backward_kernel, "plain_backward", "DH P DP BIAS")
    return [
        *forward(FORWARD, "bf16", "gelu_tanh"),
        *forward(FORWARD, "fp32", "gelu_tanh", "gain"),
        *backward(BACKWARD, "bf16", "gelu_tanh"),
        *backward(COLUMNS, "bf16", "gelu_tanh", "gain columns h"),
        *backward(SCORES, "bf16", "gelu_tanh", "scores"),
        *backward(SCORES, "fp32", "gelu_tanh", "scores"),
        *backward(SCORES, "bf16", "gelu_tanh", "scores gain columns h"),
        *forward(FORWARD, "bf16", "relu2"),
        *backward(SCORES, "bf16", "relu", "scores"),
        *backward(SCORES, "bf16", "relu2", "scores"),
    ]
