"""What the kernels that walk over rows of tokens share: their blocks, their launches, the cases they are compiled in.

A program owns BLOCK_COLS units of one tile of tokens. Kernels take their own tensors first and then, in this order,
what all of them take: GAIN ROUTE, and a backward TILES SUMS PARTIALS, a …SLOT and a …COPY for each compact copy, the
integers, the constants. The launches and cases below rely on it.
"""

import torch
from torch import Tensor

from .cases import DTYPES, SAMPLES, TOKENS, AotCase, by_tile
from .dispatch import Tile, ceil, jit, on_device, pinned, runs_ptx, selects_columns, tl
from .fold import OUTSIDE, Segments, as_stored, fold, tiles_of
from .outputs import views

# What differs from batch to batch must not make Triton compile again: only the width, which fixes the alignment of
# rows, is looked at. (It would compile for each of: 1, a multiple of 16, any other number.)
VARYING = ("tokens", "samples", "partials", "g_count", "u_count", "h_count", "p_count")


@jit
def block_of(width, BLOCK_COLS: tl.constexpr):
    """A program's tile and its units: blocks of units lie side by side, tiles one after another."""
    across = tl.cdiv(width, BLOCK_COLS)
    return tl.program_id(0) // across, (tl.program_id(0) % across) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)


@jit
def tokens_of(TILES, tile, tokens, ROWS: tl.constexpr):
    """First token and end of a tile: from the table, or ROWS tokens each where nothing is summed."""
    if TILES is None:
        return tile * ROWS, tl.minimum(tile * ROWS + ROWS, tokens)
    else:
        return tl.load(TILES + tile * 3), tl.load(TILES + tile * 3 + 1)


@jit
def load_gain(GAIN, ROUTE, row, cols, row_mask, mask, width):
    """c of a block, float32: row route[t] of the gain for token t, row 0 without a route; 0 outside the mask."""
    if ROUTE is None:
        offset = row[:, None] * 0 + cols[None, :]
    else:
        offset = tl.load(ROUTE + row, mask=row_mask, other=0)[:, None] * width + cols[None, :]
    return tl.load(GAIN + offset, mask=mask, other=0.0)


@jit
def load_slots(SLOTS, cols, mask):
    """Where the units' columns go in a compact copy, -1 for those that are not in it; without a copy no one asks."""
    if SLOTS is None:
        return cols  # Triton 3.6 does not compile what returns None
    else:
        return tl.load(SLOTS + cols, mask=mask, other=-1)


@jit
def store_columns(COMPACT, slot, begin, row, mask, x, count):
    """Scatter a block's chosen columns into rows begin + row of [tokens, count]; nothing without a compact copy."""
    if COMPACT is not None:
        base = COMPACT + begin.to(tl.int64) * count
        offset = row[:, None] * count + slot[None, :]
        tl.store(base + offset, x.to(COMPACT.dtype.element_ty), mask=mask & (slot >= 0)[None, :])


@jit
def store_sum(SUMS, PARTIALS, where, quantity, x, samples, partials, cols, width):
    """Reduce an accumulator over its tokens into its row of SUMS or PARTIALS [quantities, rows, width]; see OUTSIDE."""
    if where >= 0:
        INTO = SUMS
    else:
        INTO = PARTIALS
    row = quantity * tl.where(where >= 0, samples, partials) + tl.where(where >= 0, where, -1 - where)
    total = tl.sum(x, 0)
    total = tl.where(where >= 0, as_stored(total, quantity), total)
    tl.store(INTO + row.to(tl.int64) * width + cols, total, mask=cols < width)


@jit
def store_sums(TILES, tile, SUMS, PARTIALS, accumulators, samples, partials, cols, width):
    """A tile's accumulators, one a quantity; a tile outside every sample has nothing to sum."""
    where = tl.load(TILES + tile * 3 + 2)
    if where > OUTSIDE:
        for quantity in tl.static_range(len(accumulators)):
            store_sum(SUMS, PARTIALS, where, quantity, accumulators[quantity], samples, partials, cols, width)


def slots(index: Tensor | None, width: int, first: int = 0) -> Tensor | None:
    """int32 [width]: where a unit's column goes in the compact copy, from `first` on; -1 for a unit not in `index`.

    Kept on the index itself, which lives as long as its layer: an update of the model makes none.
    """
    if index is None:
        return None
    key = width, first, index._version
    kept = getattr(index, "slots", None)
    if kept is None or kept[0] != key:
        slot = torch.full((width,), -1, dtype=torch.int32, device=index.device)
        slot[index] = torch.arange(first, first + index.numel(), dtype=torch.int32, device=index.device)
        index.slots = kept = key, slot
    return kept[1]


def launch_forward(kernel, table: dict[str, Tile], own: list, activation: str, gain, route) -> None:
    """`own`: the kernel's tensors, the first of them [tokens, width]."""
    tokens, width = own[0].shape
    tile = pinned(table, own[0])
    grid = (ceil(tokens, tile.block_rows) * ceil(width, tile.block_cols),)
    with on_device(own[0]):
        kernel[grid](
            *own,
            gain,
            route,
            tokens,
            width,
            activation,
            runs_ptx(own[0]),
            tile.block_rows,
            tile.block_cols,
            num_warps=tile.warps,
        )


def launch_backward(
    kernel, tables: tuple[dict[str, Tile], ...], own: list, activation: str, gain, route,
    segments: Tensor | Segments | None, signed: bool, indices: list, sums: Tensor, columns: list, gradients: list,
) -> None:  # fmt: skip
    """tables: configurations of the gradients alone, with compact columns, with sums. own: the kernel's tensors.

    indices: the units whose columns of `gradients`, and last of h, are wanted compactly; columns: the two buffers.
    """
    tokens, width = own[0].shape
    bare, with_columns, with_sums = tables
    later = [None] * len(gradients)
    if any(index is not None for index in indices) and selects_columns():
        later, indices = indices[:-1], [*later, indices[-1]]
    if segments is not None:
        table = with_sums
    else:
        table = with_columns if any(index is not None for index in indices) else bare
    tile = pinned(table, own[0])
    with on_device(own[0]):
        made = into = partials = tiles = None
        count, samples, rows = ceil(tokens, tile.rows), 0, 0
        if segments is not None:
            made = tiles_of(segments, tokens, tile.rows)
            tiles, rows, into = made.table, made.partials, sums
            partials = sums.new_empty((sums.shape[0], rows, width))
            count, samples = tiles.shape[0], segments.shape[0]
        compact, chosen = _placed(indices, columns, width)
        kernel[(count * ceil(width, tile.block_cols),)](
            *own, gain, route, tiles, into, partials, *chosen, *compact,
            tokens, width, samples, rows, *(0 if x is None else x.shape[1] for x in compact),
            activation, runs_ptx(own[0]), signed, tile.rows, tile.block_rows, tile.block_cols, num_warps=tile.warps,
        )  # fmt: skip
        if segments is not None:
            fold(sums, partials, made)
        if later[0] is not None or later[-1] is not None:
            for x, index, view in zip(gradients, later, views(columns, [*later, None]), strict=False):
                if index is not None:
                    torch.index_select(x, 1, index, out=view)


def _placed(indices: list, columns: list, width: int) -> tuple[list, list]:
    """For each index the buffer of its columns and their slots there; those of the gradients lie side by side."""
    *first, last = indices
    compact = [None if index is None else columns[0] for index in first]
    compact.append(None if last is None else columns[1])
    at, chosen = 0, []
    for index in first:
        chosen.append(slots(index, width, at))
        at += 0 if index is None else index.numel()
    return compact, [*chosen, slots(last, width)]


def cases(
    kernel, name: str, tensors: str, table: dict[str, Tile], dtype: str, activation: str, more: str = ""
) -> list[AotCase]:
    """Each distinct configuration of a table.

    tensors: the parameters of shape [tokens, width], and BIAS. more: what is asked for beside them, any of "scores",
    "gain", "columns" and "h"; bytes are then those of four sums a sample and of 1 % of the units a compact copy.
    """
    parameters, asked = [parameter.name for parameter in kernel.params], more.split()
    slots, copies = ([x for x in parameters if x.endswith(end)] for end in ("SLOT", "COPY"))
    pointers = tensors.split() + ["H"] * ("h" in asked)
    moved = len(set(pointers) - {"BIAS"}) * DTYPES[dtype]
    signature = {x: "i32" for x in parameters if x.islower()} | dict.fromkeys(pointers, f"*{dtype}")
    if "gain" in asked:
        signature |= {"GAIN": "*fp32", "ROUTE": "*i64"}
    if "scores" in asked:
        signature |= {"TILES": "*i32", "SUMS": "*fp32", "PARTIALS": "*fp32"}
        moved += 4 * 4 * SAMPLES / TOKENS
    if "columns" in asked:
        signature |= dict.fromkeys(slots, "*i32") | dict.fromkeys(copies, f"*{dtype}")
        moved += len(copies) * 0.01 * DTYPES[dtype]
    found = []
    for tile, targets in by_tile(table):
        sizes = {"ROWS": tile.rows, "BLOCK_ROWS": tile.block_rows, "BLOCK_COLS": tile.block_cols}
        constexprs = {"ACTIVATION": activation, "SIGNED": False, **sizes}
        found.append(
            AotCase(
                name=" ".join((name, activation, dtype, *asked)),
                kernel=kernel,
                signature=signature,
                constexprs={x: value for x, value in constexprs.items() if x in parameters},
                options={"num_warps": tile.warps},
                divisible=("width",),
                targets=targets,
                bytes_moved=moved,
                bytes_minimum=moved,
            )
        )
    return found
