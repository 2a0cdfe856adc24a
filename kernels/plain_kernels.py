"""The Triton kernels of the plain activation, their launches and their pinned configurations; see plain.py."""

from .activations import triton_value, triton_value_and_slope
from .blocks import load_gain, slots, store_columns, store_sum
from .compile import DTYPES, SAMPLES, TOKENS, AotCase, by_tile
from .dispatch import Tile, jit, on_device, pinned, tl, triton
from .fold import OUTSIDE, fold, tile_table

# As in gated_kernels.py, with one tensor less to hold.
FORWARD = {"default": Tile(8, 8, 256, 4), "interpret": Tile(8, 8, 32, 1)}
BACKWARD = {"default": Tile(8, 8, 256, 4), "interpret": Tile(16, 8, 32, 1)}
COLUMNS = {"default": Tile(32, 4, 256, 4), "gfx942": Tile(32, 8, 256, 4), "interpret": Tile(16, 8, 32, 1)}
SCORES = {"default": Tile(256, 4, 256, 4), "gfx942": Tile(256, 8, 256, 4), "interpret": Tile(16, 8, 32, 1)}


@jit
def _forward_kernel(
    P, H, BIAS, GAIN, ROUTE, tokens, width,
    ACTIVATION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(width, BLOCK_COLS)
    begin = (tl.program_id(0) // across) * BLOCK_ROWS
    cols = (tl.program_id(0) % across) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
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
    h = triton_value(z, ACTIVATION)
    if GAIN is not None:
        h = tl.where(c == 0, 0.0, h)
    tl.store(H + base + offset, h.to(H.dtype.element_ty), mask=mask)


@jit
def _backward_kernel(
    DH, P, DP, H, BIAS, GAIN, ROUTE, TILES, SUMS, PARTIALS, PSLOT, HSLOT, PCOLS, HCOLS,
    tokens, width, samples, partials, p_count, h_count,
    ACTIVATION: tl.constexpr, SIGNED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_COLS units of one tile of tokens."""
    across = tl.cdiv(width, BLOCK_COLS)
    tile = tl.program_id(0) // across
    cols = (tl.program_id(0) % across) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    if TILES is None:
        begin = tile * ROWS
        end = tl.minimum(begin + ROWS, tokens)
    else:
        begin = tl.load(TILES + tile * 3)
        end = tl.load(TILES + tile * 3 + 1)
    col_mask = cols < width
    if BIAS is not None:
        bias = tl.load(BIAS + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if PSLOT is not None:
        p_slot = tl.load(PSLOT + cols, mask=col_mask, other=-1)
    if HSLOT is not None:
        h_slot = tl.load(HSLOT + cols, mask=col_mask, other=-1)
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
        h, slope = triton_value_and_slope(z, ACTIVATION)
        h = tl.where(on, h, 0.0)
        dz = tl.where(on, slope * d, 0.0)
        dp = dz
        if GAIN is not None:
            dp = c * dz
        tl.store(DP + base + offset, dp.to(DP.dtype.element_ty), mask=mask)
        if H is not None:
            tl.store(H + base + offset, h.to(H.dtype.element_ty), mask=mask)
        if PSLOT is not None:
            store_columns(PCOLS, p_slot, begin, step + rows, mask, dp, p_count)
        if HSLOT is not None:
            store_columns(HCOLS, h_slot, begin, step + rows, mask, h, h_count)
        if TILES is not None:
            score += z * dz if SIGNED else tl.abs(z * dz)
            unit += h * d if SIGNED else tl.abs(h * d)
            active += tl.where(on & (z > 0), 1.0, 0.0)
            total += h
    if TILES is not None:
        where = tl.load(TILES + tile * 3 + 2)
        if where > OUTSIDE:
            if where >= 0:
                INTO = SUMS
            else:
                INTO = PARTIALS
            to = tl.where(where >= 0, where, -1 - where)
            rows_of = tl.where(where >= 0, samples, partials)
            store_sum(INTO, score, 0, to, rows_of, cols, width)
            store_sum(INTO, unit, 1, to, rows_of, cols, width)
            store_sum(INTO, active, 2, to, rows_of, cols, width)
            store_sum(INTO, total, 3, to, rows_of, cols, width)


def launch_forward(pre, activation, bias, gain, route, h) -> None:
    tokens, width = pre.shape
    tile = pinned(FORWARD, pre)
    grid = (triton.cdiv(tokens, tile.block_rows) * triton.cdiv(width, tile.block_cols),)
    with on_device(pre):
        _forward_kernel[grid](
            pre, h, bias, gain, route, tokens, width, activation, tile.block_rows, tile.block_cols, num_warps=tile.warps
        )


def launch_backward(dh, pre, activation, bias, gain, route, segments, signed, indices, dpre, h, sums, columns):
    tokens, width = pre.shape
    plain = COLUMNS if any(index is not None for index in indices) else BACKWARD
    tile = pinned(plain if segments is None else SCORES, pre)
    with on_device(pre):
        tiles = owned = partials = None
        count, samples, rows = triton.cdiv(tokens, tile.rows), 0, 0
        if segments is not None:
            tiles, owned, rows = tile_table(segments, tokens, tile.rows)
            partials = sums.new_empty((4, rows, width))
            count, samples = tiles.shape[0], segments.shape[0]
        compact = [None if index is None else x for x, index in zip(columns, indices, strict=True)]
        _backward_kernel[(count * triton.cdiv(width, tile.block_cols),)](
            dh, pre, dpre, h, bias, gain, route, tiles, None if tiles is None else sums, partials,
            *(slots(index, width) for index in indices), *compact,
            tokens, width, samples, rows, *(0 if index is None else index.numel() for index in indices),
            activation, signed, tile.rows, tile.block_rows, tile.block_cols, num_warps=tile.warps,
        )  # fmt: skip
        if segments is not None:
            fold(sums, partials, owned)


def _aot(table, dtype, activation, kernel=_backward_kernel, more="", extra=0.0) -> list[AotCase]:
    """The cases of one pinned table; `more` names what is asked for beside the gradient. BLOOM's bias always."""
    forward = kernel is _forward_kernel
    tensors = "P H" if forward else "DH P DP" + " H" * ("h" in more)
    signature = dict.fromkeys(tensors.split(), f"*{dtype}") | dict.fromkeys(("tokens", "width"), "i32")
    signature |= {"BIAS": f"*{dtype}"}
    if not forward:
        signature |= dict.fromkeys(("samples", "partials", "p_count", "h_count"), "i32")
    if "gain" in more:
        signature |= {"GAIN": "*fp32", "ROUTE": "*i64"}
    if "scores" in more:
        signature |= {"TILES": "*i32", "SUMS": "*fp32", "PARTIALS": "*fp32"}
    if "columns" in more:
        signature |= dict.fromkeys(("PSLOT", "HSLOT"), "*i32") | dict.fromkeys(("PCOLS", "HCOLS"), f"*{dtype}")
    cases = []
    for tile, targets in by_tile(table):
        constexprs = {"ACTIVATION": activation, "BLOCK_ROWS": tile.block_rows, "BLOCK_COLS": tile.block_cols}
        if not forward:
            constexprs |= {"SIGNED": False, "ROWS": tile.rows}
        moved = len(tensors.split()) * DTYPES[dtype] + extra
        cases.append(
            AotCase(
                name=" ".join(filter(None, (f"plain{kernel.__name__[:-7]}", activation, dtype, more))),
                kernel=kernel,
                signature=signature,
                constexprs=constexprs,
                options={"num_warps": tile.warps},
                divisible=("width",),
                targets=targets,
                bytes_moved=moved,
                bytes_minimum=moved,
            )
        )
    return cases


def aot() -> list[AotCase]:
    """Every pinned configuration: BLOOM's gelu_tanh in each dtype, and each option that changes its registers."""
    sums = 16 * SAMPLES / TOKENS
    columns = 2 * 0.01 * 2  # 1 % of the units in two compact copies
    return [
        *_aot(FORWARD, "bf16", "gelu_tanh", _forward_kernel),
        *_aot(FORWARD, "fp32", "gelu_tanh", _forward_kernel, "gain"),
        *_aot(BACKWARD, "bf16", "gelu_tanh"),
        *_aot(COLUMNS, "bf16", "gelu_tanh", more="gain columns h", extra=columns),
        *_aot(SCORES, "bf16", "gelu_tanh", more="scores", extra=sums),
        *_aot(SCORES, "fp32", "gelu_tanh", more="scores", extra=sums),
        *_aot(SCORES, "bf16", "gelu_tanh", more="scores gain columns h", extra=sums + columns),
    ]
