"""Row tiles that never straddle two samples, and the fold of their partial sums in a fixed order.

A kernel that reduces over the tokens of each sample loops over tiles of at most `rows` tokens, cut at every sample's
ends. A sample of one tile is summed at once; of a longer one each tile writes a float32 partial, and `fold` adds them
from the first to the last. No atomics: a rerun gives the same bits, and a sample has the same sum alone and in any
packed batch.

Tokens outside every segment (padding, or the prompt when only the target is scored) lie in tiles of their own, since
a kernel that writes a value per token must visit them too.
"""

import itertools

import torch
from torch import Tensor

from .compile import AotCase
from .dispatch import jit, tl, triton

# In a tile's third number: ≥ 0 is a row of the sums, < 0 is row -1-x of the partials, and this is neither.
OUTSIDE = tl.constexpr(-(1 << 30)) if triton is not None else None

TABLE_BLOCK, FOLD_BLOCK = 128, 1024


def check_segments(segments: Tensor) -> None:
    """Segments are int32 [samples, 2], half-open, ascending and disjoint; the order is the caller's invariant."""
    assert segments.shape[1:] == (2,), f"segments {tuple(segments.shape)}: expected [samples, 2]"
    assert segments.dtype == torch.int32, f"segments {segments.dtype}: expected int32"


def host_tiles(segments: Tensor | None, tokens: int, rows: int) -> list[tuple[int, int, int]]:
    """Tiles in order as (begin, end, sample) for the torch path; sample is -1 outside every segment."""
    edges = [0, *(segments.flatten().tolist() if segments is not None else []), tokens]
    tiles = []
    for region, (low, high) in enumerate(itertools.pairwise(edges)):
        sample = region // 2 if region % 2 else -1
        tiles += [(begin, min(begin + rows, high), sample) for begin in range(low, high, rows)]
    return tiles


def segment_sums(x: Tensor, segments: Tensor) -> Tensor:
    """[samples, width]: the sum of x [tokens, width] over each segment's tokens; zero for an empty segment."""
    ranges = segments.tolist()
    return torch.stack([x[begin:end].sum(0) for begin, end in ranges]) if ranges else x.new_zeros(0, x.shape[1])


@jit
def _edge(SEGMENTS, region, samples, tokens):
    """Where a region begins: regions alternate between gaps and segments, 2·samples + 1 of them."""
    inner = (region > 0) & (region <= 2 * samples)
    edge = tl.load(SEGMENTS + region - 1, mask=inner, other=0)
    return tl.where(region > 2 * samples, tokens, edge)


@jit
def _table_kernel(SEGMENTS, TILES, OWNED, samples, tokens, capacity, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """One program a region: count the tiles and partials before it, then write its own."""
    region = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    tiles = tl.zeros((BLOCK,), tl.int32)
    partials = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, region, BLOCK):
        r = start + lane
        length = _edge(SEGMENTS, r + 1, samples, tokens) - _edge(SEGMENTS, r, samples, tokens)
        count = tl.where(r < region, (length + ROWS - 1) // ROWS, 0)
        tiles += count
        partials += tl.where((r % 2 == 1) & (count > 1), count, 0)
    first = tl.sum(tiles, 0)
    partial = tl.sum(partials, 0)
    low = _edge(SEGMENTS, region, samples, tokens)
    high = _edge(SEGMENTS, region + 1, samples, tokens)
    count = (high - low + ROWS - 1) // ROWS
    sample = region // 2
    for start in range(0, count, BLOCK):
        i = start + lane
        tile = TILES + (first + i) * 3
        tl.store(tile, low + i * ROWS, mask=i < count)
        tl.store(tile + 1, tl.minimum(low + (i + 1) * ROWS, high), mask=i < count)
        row = tl.where(count == 1, sample, -1 - partial - i)
        tl.store(tile + 2, tl.where(region % 2 == 1, row, OUTSIDE), mask=i < count)
    if region % 2 == 1:
        tl.store(OWNED + sample * 2, partial)
        tl.store(OWNED + sample * 2 + 1, tl.where(count == 1, partial - 1, partial + count))
    if region == 2 * samples:
        for start in range(first + count, capacity, BLOCK):
            i = start + lane
            tl.store(TILES + i * 3, tokens, mask=i < capacity)
            tl.store(TILES + i * 3 + 1, tokens, mask=i < capacity)
            tl.store(TILES + i * 3 + 2, OUTSIDE, mask=i < capacity)


def tile_table(segments: Tensor, tokens: int, rows: int) -> tuple[Tensor, Tensor, int]:
    """The tiles on the device in one launch, without waiting for it: (tiles, owned, partials).

    tiles int32 [n, 3]: first token, end, and where the sums go (see OUTSIDE). owned int32 [samples, 2]: a segment's
    range of partials, its end before its begin when the segment is one tile. n and `partials`, the rows that a buffer
    of partials needs, are bounds that depend on shapes alone; tiles past the last are empty.
    """
    samples = segments.shape[0]
    capacity = tokens // rows + 2 * samples + 1
    tiles = segments.new_empty((capacity, 3))
    owned = segments.new_empty((samples, 2))
    segments = segments.contiguous()
    _table_kernel[(2 * samples + 1,)](segments, tiles, owned, samples, tokens, capacity, rows, TABLE_BLOCK, num_warps=1)
    # A segment of x > 1 tiles' worth of tokens has fewer than 2x tiles.
    return tiles, owned, 2 * tokens // rows


@jit
def _fold_kernel(SUMS, PARTIALS, OWNED, samples, partials, width, BLOCK: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sample = tl.program_id(1)
    quantity = tl.program_id(2)
    first = tl.load(OWNED + sample * 2)
    last = tl.load(OWNED + sample * 2 + 1)
    inside = cols < width
    if last >= first:
        total = tl.zeros((BLOCK,), tl.float32)
        for partial in range(first, last):
            row = (quantity * partials + partial).to(tl.int64)
            total += tl.load(PARTIALS + row * width + cols, mask=inside, other=0.0)
        tl.store(SUMS + (quantity * samples + sample).to(tl.int64) * width + cols, total, mask=inside)


def fold(sums: Tensor, partials: Tensor, owned: Tensor) -> None:
    """Add each segment's partials [Q, rows, width] in order into sums [Q, samples, width]; zero where it is empty.

    Rows of segments of one tile, whose sums are written already, stay as they are.
    """
    quantities, samples, width = sums.shape
    if samples == 0:
        return
    grid = (triton.cdiv(width, FOLD_BLOCK), samples, quantities)
    _fold_kernel[grid](sums, partials, owned, samples, partials.shape[1], width, FOLD_BLOCK, num_warps=4)


def aot() -> list[AotCase]:
    """Both kernels; bytes of the fold are per partial of a long sample."""
    table = dict.fromkeys(("SEGMENTS", "TILES", "OWNED"), "*i32") | dict.fromkeys(
        ("samples", "tokens", "capacity"), "i32"
    )
    sums = {"SUMS": "*fp32", "PARTIALS": "*fp32", "OWNED": "*i32"} | dict.fromkeys(
        ("samples", "partials", "width"), "i32"
    )
    return [
        AotCase(
            name="tile_table",
            kernel=_table_kernel,
            signature=table,
            constexprs={"ROWS": 256, "BLOCK": TABLE_BLOCK},
            options={"num_warps": 1},
            bytes_moved=12,
            bytes_minimum=12,
            element="tile",
            streaming=False,
        ),
        AotCase(
            name="fold",
            kernel=_fold_kernel,
            signature=sums,
            constexprs={"BLOCK": FOLD_BLOCK},
            divisible=("width",),
            bytes_moved=4,
            bytes_minimum=4,
            element="partial",
        ),
    ]
