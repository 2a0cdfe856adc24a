"""Row tiles that never straddle two samples, and the fold of their partial sums in a fixed order.

A kernel that reduces over the tokens of each sample loops over tiles of at most `rows` tokens, cut at every sample's
ends. A sample of one tile is summed at once; of a longer one each tile writes a float32 partial, and `fold` adds them
from the first to the last. No atomics: a rerun gives the same bits, and a sample has the same sum alone and in any
packed batch.

Tokens outside every segment (padding, or the prompt when only the target is scored) lie in tiles of their own, since
a kernel that writes a value per token must visit them too.
"""

import itertools
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .cases import AotCase
from .dispatch import ceil, jit, tl, triton, upload

# In a tile's third number: ≥ 0 is a row of the sums, < 0 is row -1-x of the partials, and this is neither.
OUTSIDE = tl.constexpr(-(1 << 30)) if triton is not None else None

TABLE_BLOCK, FOLD_BLOCK = 128, 1024
COUNTED = 2
"""Which of a backward's sums is a count, kept as int32 bits in the place of a float32."""
COUNTS = tl.constexpr(COUNTED) if triton is not None else None


class Tiles(NamedTuple):
    """The row tiles of a batch on the device."""

    table: Tensor
    """int32 [n, 3]: first token, end, and where the sums go (see OUTSIDE)."""
    owned: Tensor
    """int32 [samples, 2]: a segment's range of partials, its end before its begin when the segment is one tile."""
    partials: int
    """Rows that a buffer of partials needs."""
    folds: bool
    """Whether some segment is not one tile, so that `fold` has something to write."""


class Segments:
    """The token ranges of a batch's samples where the host knows them: half-open, ascending, disjoint.

    What takes int32 [samples, 2] takes this as well. Tiles are then counted, not bounded (no program without work, no
    fold where none is needed), and made once: all layers of a batch share one table and one copy to the device.
    """

    def __init__(self, ranges: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> None:
        self.ranges = [(int(begin), int(end)) for begin, end in ranges]
        self.device = torch.device(device)
        self.shape = (len(self.ranges), 2)
        self._tiles: dict[tuple[int, int], Tiles] = {}

    @cached_property
    def table(self) -> Tensor:
        """int32 [samples, 2] on the device."""
        return upload(self.ranges, torch.int32, self.device).reshape(-1, 2)

    def lengths(self) -> Tensor:
        """float32 [samples] on the device: tokens of each sample."""
        return upload([float(end - begin) for begin, end in self.ranges], torch.float32, self.device)

    def tiles(self, tokens: int, rows: int) -> Tiles:
        """Tiles of at most `rows` tokens."""
        if (tokens, rows) not in self._tiles:
            self._tiles[tokens, rows] = _counted(self, tokens, rows)
        return self._tiles[tokens, rows]


def check_segments(segments: Tensor | Segments) -> None:
    """A tensor is int32 [samples, 2], half-open, ascending and disjoint; the order is the caller's invariant."""
    if isinstance(segments, Tensor):
        assert segments.shape[1:] == (2,), f"segments {tuple(segments.shape)}: expected [samples, 2]"
        assert segments.dtype == torch.int32, f"segments {segments.dtype}: expected int32"


def as_tensor(segments: Tensor | Segments | None) -> Tensor | None:
    """What an op of torch.library can take."""
    return segments.table if isinstance(segments, Segments) else segments


def ranges_of(segments: Tensor | Segments | None) -> list[tuple[int, int]]:
    """The ranges on the host; waits for the device where a tensor lies there."""
    if isinstance(segments, Segments):
        return segments.ranges
    return [] if segments is None else [(begin, end) for begin, end in segments.tolist()]


def host_tiles(segments: Tensor | Segments | None, tokens: int, rows: int) -> list[tuple[int, int, int]]:
    """Tiles in order as (begin, end, sample) for the torch path; sample is -1 outside every segment."""
    edges = [0, *itertools.chain(*ranges_of(segments)), tokens]
    tiles = []
    for region, (low, high) in enumerate(itertools.pairwise(edges)):
        sample = region // 2 if region % 2 else -1
        tiles += [(begin, min(begin + rows, high), sample) for begin in range(low, high, rows)]
    return tiles


def _counted(segments: Segments, tokens: int, rows: int) -> Tiles:
    """The table of ranges that the host knows, in one copy to the device."""
    tiles = host_tiles(segments, tokens, rows)
    counts = [-(-(end - begin) // rows) for begin, end in segments.ranges]
    first = list(itertools.accumulate((n if n > 1 else 0 for n in counts), initial=0))
    seen, flat = 0, []
    for begin, end, sample in tiles:
        where = OUTSIDE.value if sample < 0 else sample if counts[sample] == 1 else -1 - seen
        seen += sample >= 0 and counts[sample] > 1
        flat += [begin, end, where]
    flat += [0] * (-len(flat) % 4)  # what follows starts at 16 bytes, as the kernels are compiled for
    owned = [edge for n, at in zip(counts, first, strict=False) for edge in (at, at + n if n != 1 else at - 1)]
    both = upload(flat + owned, torch.int32, segments.device)
    table, owned = both[: 3 * len(tiles)].view(-1, 3), both[len(flat) :].view(-1, 2)
    return Tiles(table, owned, first[-1], any(n != 1 for n in counts))


def segment_sums(x: Tensor, segments: Tensor | Segments) -> Tensor:
    """[samples, width]: the sum of x [tokens, width] over each segment's tokens; zero for an empty segment."""
    ranges = ranges_of(segments)
    return torch.stack([x[begin:end].sum(0) for begin, end in ranges]) if ranges else x.new_zeros(0, x.shape[1])


@jit
def _edge(SEGMENTS, region, samples, tokens):
    """Where a region begins: regions alternate between gaps and segments, 2·samples + 1 of them."""
    inner = (region > 0) & (region <= 2 * samples)
    edge = tl.load(SEGMENTS + region - 1, mask=inner, other=0)
    return tl.where(region > 2 * samples, tokens, edge)


@jit(do_not_specialize=("samples", "tokens", "capacity"))
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


def tiles_of(segments: Tensor | Segments, tokens: int, rows: int) -> Tiles:
    """The tiles on the device, without waiting for it.

    Of a tensor, whose ranges only the device knows, one launch makes them: the number of tiles and `partials` are
    bounds that depend on shapes alone, and tiles past the last are empty.
    """
    if isinstance(segments, Segments):
        return segments.tiles(tokens, rows)
    samples = segments.shape[0]
    capacity = tokens // rows + 2 * samples + 1
    tiles = segments.new_empty((capacity, 3))
    owned = segments.new_empty((samples, 2))
    segments = segments.contiguous()
    _table_kernel[(2 * samples + 1,)](segments, tiles, owned, samples, tokens, capacity, rows, TABLE_BLOCK, num_warps=1)
    # A segment of x > 1 tiles' worth of tokens has fewer than 2x tiles.
    return Tiles(tiles, owned, 2 * tokens // rows, samples > 0)


@jit
def as_stored(total, quantity):
    """A sum as its float32 bits, a count as those of an int32 (exact: far below 2**24 tokens a sample)."""
    return tl.where(quantity == COUNTS, total.to(tl.int32), total.to(tl.int32, bitcast=True)).to(
        tl.float32, bitcast=True
    )


@jit(do_not_specialize=("samples", "partials"))
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
        row = (quantity * samples + sample).to(tl.int64)
        tl.store(SUMS + row * width + cols, as_stored(total, quantity), mask=inside)


def fold(sums: Tensor, partials: Tensor, tiles: Tiles) -> None:
    """Add each segment's partials [Q, rows, width] in order into sums [Q, samples, width]; zero where it is empty.

    Rows of segments of one tile, whose sums are written already, stay as they are; where all are, nothing is launched.
    """
    quantities, samples, width = sums.shape
    if not tiles.folds:
        return
    grid = (ceil(width, FOLD_BLOCK), samples, quantities)
    _fold_kernel[grid](sums, partials, tiles.owned, samples, partials.shape[1], width, FOLD_BLOCK, num_warps=4)


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
