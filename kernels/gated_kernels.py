"""The Triton kernels of the gated activation, their launches and their pinned configurations; see gated.py."""

from .activations import triton_value, triton_value_and_slope
from .blocks import load_gain, slots, store_columns, store_sum
from .compile import DTYPES, SAMPLES, TOKENS, AotCase, by_tile
from .dispatch import Tile, jit, on_device, pinned, tl, triton
from .fold import OUTSIDE, fold, tile_table

# Registers of a tile decide how many programs a multiprocessor holds, and those decide how much is in flight. Without
# scores 8x256 in 4 warps (two 16-byte loads a thread and tensor) takes 56 registers on sm_90; with the four
# accumulators 4x256 takes 90 where 8x256 takes 155. CDNA's warps are 64 wide: 8x256 for 16-byte accesses there.
# 256 tokens a program: a sentence is summed by one program and needs no fold. Compact columns need three offsets an
# element (183 registers at 8x256 with triton 3.6), and 32 tokens a program spread the cost of reading the slots.
FORWARD = {"default": Tile(8, 8, 256, 4), "interpret": Tile(8, 8, 32, 1)}
BACKWARD = {"default": Tile(8, 8, 256, 4), "interpret": Tile(16, 8, 32, 1)}
COLUMNS = {"default": Tile(32, 4, 256, 4), "gfx942": Tile(32, 8, 256, 4), "interpret": Tile(16, 8, 32, 1)}
SCORES = {"default": Tile(256, 4, 256, 4), "gfx942": Tile(256, 8, 256, 4), "interpret": Tile(16, 8, 32, 1)}


@jit
def _forward_kernel(
    G, U, H, GAIN, ROUTE, tokens, width,
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
    g = tl.load(G + base + offset, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(U + base + offset, mask=mask, other=0.0).to(tl.float32)
    if GAIN is None:
        h = triton_value(g, ACTIVATION) * u
    else:
        c = load_gain(GAIN, ROUTE, begin + rows, cols, row_mask, mask, width)
        h = tl.where(c == 0, 0.0, triton_value(c * g, ACTIVATION) * (c * u))
    tl.store(H + base + offset, h.to(H.dtype.element_ty), mask=mask)


@jit
def _gradients(d, g, u, c, ACTIVATION: tl.constexpr):
    """dg, du, h and whether the unit is active, of a float32 block; all zero where c = 0."""
    if c is None:
        act, slope = triton_value_and_slope(g, ACTIVATION)
        return slope * u * d, act * d, act * u, g > 0
    else:
        act, slope = triton_value_and_slope(c * g, ACTIVATION)
        on = c != 0
        dg = tl.where(on, c * (slope * (c * u) * d), 0.0)
        du = tl.where(on, c * (act * d), 0.0)
        return dg, du, tl.where(on, act * (c * u), 0.0), c * g > 0


@jit
def _backward_kernel(
    DH, G, U, DG, DU, H, GAIN, ROUTE, TILES, SUMS, PARTIALS, GSLOT, USLOT, HSLOT, GCOLS, UCOLS, HCOLS,
    tokens, width, samples, partials, g_count, u_count, h_count,
    ACTIVATION: tl.constexpr, SIGNED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_COLS units of one tile of tokens. DG, DU, H may be G, U, DH: a thread writes only the
    elements that it has read (a tile must not be smaller than the block of threads, which would share elements)."""
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
    if GSLOT is not None:
        g_slot = tl.load(GSLOT + cols, mask=col_mask, other=-1)
    if USLOT is not None:
        u_slot = tl.load(USLOT + cols, mask=col_mask, other=-1)
    if HSLOT is not None:
        h_slot = tl.load(HSLOT + cols, mask=col_mask, other=-1)
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
            dg, du, h, on = _gradients(d, g, u, None, ACTIVATION)
        else:
            c = load_gain(GAIN, ROUTE, row, cols, row_mask, mask, width)
            dg, du, h, on = _gradients(d, g, u, c, ACTIVATION)
        tl.store(DG + base + offset, dg.to(DG.dtype.element_ty), mask=mask)
        tl.store(DU + base + offset, du.to(DU.dtype.element_ty), mask=mask)
        if H is not None:
            tl.store(H + base + offset, h.to(H.dtype.element_ty), mask=mask)
        if GSLOT is not None:
            store_columns(GCOLS, g_slot, begin, step + rows, mask, dg, g_count)
        if USLOT is not None:
            store_columns(UCOLS, u_slot, begin, step + rows, mask, du, u_count)
        if HSLOT is not None:
            store_columns(HCOLS, h_slot, begin, step + rows, mask, h, h_count)
        if TILES is not None:
            # Masked elements were loaded as zeros and add nothing.
            g_score += g * dg if SIGNED else tl.abs(g * dg)
            u_score += u * du if SIGNED else tl.abs(u * du)
            active += tl.where(on, 1.0, 0.0)
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
            store_sum(INTO, g_score, 0, to, rows_of, cols, width)
            store_sum(INTO, u_score, 1, to, rows_of, cols, width)
            store_sum(INTO, active, 2, to, rows_of, cols, width)
            store_sum(INTO, total, 3, to, rows_of, cols, width)


def launch_forward(gate, up, activation, gain, route, h) -> None:
    tokens, width = gate.shape
    tile = pinned(FORWARD, gate)
    grid = (triton.cdiv(tokens, tile.block_rows) * triton.cdiv(width, tile.block_cols),)
    with on_device(gate):
        _forward_kernel[grid](
            gate, up, h, gain, route, tokens, width, activation, tile.block_rows, tile.block_cols, num_warps=tile.warps
        )


def launch_backward(dh, gate, up, activation, gain, route, segments, signed, indices, dgate, dup, h, sums, columns):
    tokens, width = gate.shape
    plain = COLUMNS if any(index is not None for index in indices) else BACKWARD
    tile = pinned(plain if segments is None else SCORES, gate)
    with on_device(gate):
        tiles = owned = partials = None
        count, samples, rows = triton.cdiv(tokens, tile.rows), 0, 0
        if segments is not None:
            tiles, owned, rows = tile_table(segments, tokens, tile.rows)
            partials = sums.new_empty((4, rows, width))
            count, samples = tiles.shape[0], segments.shape[0]
        compact = [None if index is None else x for x, index in zip(columns, indices, strict=True)]
        _backward_kernel[(count * triton.cdiv(width, tile.block_cols),)](
            dh, gate, up, dgate, dup, h, gain, route, tiles, None if tiles is None else sums, partials,
            *(slots(index, width) for index in indices), *compact,
            tokens, width, samples, rows, *(0 if index is None else index.numel() for index in indices),
            activation, signed, tile.rows, tile.block_rows, tile.block_cols, num_warps=tile.warps,
        )  # fmt: skip
        if segments is not None:
            fold(sums, partials, owned)


def _aot(table, dtype, activation, kernel=_backward_kernel, more="", extra=0.0) -> list[AotCase]:
    """The cases of one pinned table; `more` names what is asked for beside the gradients."""
    forward = kernel is _forward_kernel
    tensors = "G U H" if forward else "DH G U DG DU" + " H" * ("h" in more)
    signature = dict.fromkeys(tensors.split(), f"*{dtype}") | dict.fromkeys(("tokens", "width"), "i32")
    if not forward:
        signature |= dict.fromkeys(("samples", "partials", "g_count", "u_count", "h_count"), "i32")
    if "gain" in more:
        signature |= {"GAIN": "*fp32", "ROUTE": "*i64"}
    if "scores" in more:
        signature |= {"TILES": "*i32", "SUMS": "*fp32", "PARTIALS": "*fp32"}
    if "columns" in more:
        signature |= dict.fromkeys(("GSLOT", "USLOT", "HSLOT"), "*i32")
        signature |= dict.fromkeys(("GCOLS", "UCOLS", "HCOLS"), f"*{dtype}")
    cases = []
    for tile, targets in by_tile(table):
        constexprs = {"ACTIVATION": activation, "BLOCK_ROWS": tile.block_rows, "BLOCK_COLS": tile.block_cols}
        if not forward:
            constexprs |= {"SIGNED": False, "ROWS": tile.rows}
        moved = len(tensors.split()) * DTYPES[dtype] + extra
        cases.append(
            AotCase(
                name=" ".join(filter(None, (f"gated{kernel.__name__[:-7]}", activation, dtype, more))),
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
    """Every pinned configuration, with each dtype, activation and option that changes its registers."""
    sums = 16 * SAMPLES / TOKENS
    columns = 3 * 0.01 * 2  # 1 % of the units in three compact copies
    return [
        *_aot(FORWARD, "bf16", "silu", _forward_kernel),
        *_aot(FORWARD, "fp32", "silu", _forward_kernel),
        *_aot(FORWARD, "bf16", "gelu_tanh", _forward_kernel, "gain"),
        *_aot(BACKWARD, "bf16", "silu"),
        *_aot(BACKWARD, "fp32", "silu"),
        *_aot(COLUMNS, "bf16", "silu", more="columns h", extra=columns),
        *_aot(COLUMNS, "bf16", "gelu_tanh", more="gain columns h", extra=columns),
        *_aot(SCORES, "bf16", "silu", more="scores", extra=sums),
        *_aot(SCORES, "bf16", "gelu_tanh", more="scores", extra=sums),
        *_aot(SCORES, "bf16", "gelu", more="scores", extra=sums),
        *_aot(SCORES, "fp16", "silu", more="scores", extra=sums),
        *_aot(SCORES, "fp32", "silu", more="scores", extra=sums),
        *_aot(SCORES, "bf16", "gelu_tanh", more="scores gain columns h", extra=sums + columns),
    ]
