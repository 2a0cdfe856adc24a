"""The score tap of a projection whose output enters no activation: per-sample sums of y·dy.

    score = tap(y, dy, segments, "mean_abs")        # CANEFT Eq. 8 for `down`, before its division by the tokens

Gated projections need no tap: `gated_backward` gives their scores from registers it holds anyway.
"""

import torch
from torch import Tensor

from .common.blocks import block_of, store_sum, tokens_of
from .common.cases import SAMPLES, TOKENS, AotCase, by_tile
from .common.dispatch import Tile, ceil, jit, on_device, pinned, runs_now, tl, use_triton
from .common.fold import OUTSIDE, Segments, as_tensor, check_segments, fold, segment_sums, tiles_of
from .common.outputs import Reduce, wide
from .common.torch_blocks import blocks_of, compute

# Two tensors and one accumulator leave room for two 16-byte loads a thread and tensor.
TAP = {"default": Tile(256, 8, 256, 4), "interpret": Tile(16, 8, 32, 1)}


def tap_reference(y: Tensor, dy: Tensor, segments: Tensor | Segments, reduce: Reduce = "mean_abs") -> Tensor:
    """The specification of `tap`."""
    product = compute(y) * compute(dy)
    return segment_sums(product.abs() if reduce == "mean_abs" else product, segments)


@jit(do_not_specialize=("samples", "partials"))
def _tap_kernel(
    Y, DY, TILES, SUMS, PARTIALS, width, samples, partials,
    SIGNED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    tile, cols = block_of(width, BLOCK_COLS)
    begin, end = tokens_of(TILES, tile, 0, 0)
    where = tl.load(TILES + tile * 3 + 2)
    if where > OUTSIDE:
        base = begin.to(tl.int64) * width
        rows = tl.arange(0, BLOCK_ROWS)
        score = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
        for step in range(0, end - begin, BLOCK_ROWS):
            mask = (begin + step + rows < end)[:, None] & (cols < width)[None, :]
            offset = (step + rows)[:, None] * width + cols[None, :]
            y = tl.load(Y + base + offset, mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(DY + base + offset, mask=mask, other=0.0).to(tl.float32)
            score += y * dy if SIGNED else tl.abs(y * dy)
        store_sum(SUMS, PARTIALS, where, 0, score, samples, partials, cols, width)


def _launch(y: Tensor, dy: Tensor, segments: Tensor | Segments, signed: bool, sums: Tensor) -> None:
    tokens, width = y.shape
    tile = pinned(TAP, y)
    with on_device(y):
        tiles = tiles_of(segments, tokens, tile.rows)
        partials = sums.new_empty((1, tiles.partials, width))
        grid = (tiles.table.shape[0] * ceil(width, tile.block_cols),)
        _tap_kernel[grid](
            y, dy, tiles.table, sums, partials, width, segments.shape[0], tiles.partials,
            signed, tile.block_rows, tile.block_cols, num_warps=tile.warps,
        )  # fmt: skip
        fold(sums[None], partials, tiles)


def _torch(y: Tensor, dy: Tensor, segments: Tensor | Segments, signed: bool, sums: Tensor) -> None:
    sums.zero_()
    for block in blocks_of(y, segments):
        product = compute(y[block.rows]) * compute(dy[block.rows])
        block.add_sums(sums[None], product if signed else product.abs_())


def _allocate(y: Tensor, segments: Tensor | Segments) -> Tensor:
    return y.new_empty((segments.shape[0], y.shape[1]), dtype=wide(y))


def _tap(y: Tensor, dy: Tensor, segments: Tensor, signed: bool) -> Tensor:
    sums = _allocate(y, segments)
    run = _launch if use_triton(y) and sums.numel() else _torch
    run(y, dy, segments, signed, sums)
    return sums


_op = torch.library.custom_op("slicetune::tap", _tap, mutates_args=())


@_op.register_fake
def _(y, dy, segments, signed):
    return _allocate(y, segments)


def tap(y: Tensor, dy: Tensor, segments: Tensor | Segments, reduce: Reduce = "mean_abs") -> Tensor:
    """float32 [S, width]: over each segment's tokens the sum of |y·dy| (`mean_abs`) or of y·dy, signed (`abs_sum`).

    y, dy [T, width]; segments int32 [S, 2] or Segments, half-open token ranges, ascending and disjoint. An empty
    segment gives 0.
    """
    assert y.shape == dy.shape, f"y {tuple(y.shape)}, dy {tuple(dy.shape)}: want one shape"
    check_segments(segments)
    y, dy, signed = y.contiguous(), dy.contiguous(), reduce == "abs_sum"
    now = runs_now(y, dy, None if isinstance(segments, Segments) else segments)
    return _tap(y, dy, segments, signed) if now else _op(y, dy, as_tensor(segments), signed)


def aot() -> list[AotCase]:
    """The pinned configuration in half and in full precision."""
    names = dict.fromkeys(("width", "samples", "partials"), "i32") | {
        "TILES": "*i32",
        "SUMS": "*fp32",
        "PARTIALS": "*fp32",
    }
    cases = []
    for dtype, size in (("bf16", 2), ("fp32", 4)):
        for tile, targets in by_tile(TAP):
            cases.append(
                AotCase(
                    name=f"tap {dtype}",
                    kernel=_tap_kernel,
                    signature={"Y": f"*{dtype}", "DY": f"*{dtype}", **names},
                    constexprs={"SIGNED": False, "BLOCK_ROWS": tile.block_rows, "BLOCK_COLS": tile.block_cols},
                    options={"num_warps": tile.warps},
                    divisible=("width",),
                    targets=targets,
                    bytes_moved=2 * size + 4 * SAMPLES / TOKENS,
                    bytes_minimum=2 * size + 4 * SAMPLES / TOKENS,
                    element="element of [T, H]",
                    reduces=True,
                )
            )
    return cases
