"""What the kernels of gated and plain activations share: the routing gain of a block and its compact columns."""

import torch
from torch import Tensor

from .dispatch import jit, tl


@jit
def load_gain(GAIN, ROUTE, row, cols, row_mask, mask, width):
    """c of a block, float32: row route[t] of the gain for token t, row 0 without a route; 0 outside the mask."""
    if ROUTE is None:
        offset = row[:, None] * 0 + cols[None, :]
    else:
        offset = tl.load(ROUTE + row, mask=row_mask, other=0)[:, None] * width + cols[None, :]
    return tl.load(GAIN + offset, mask=mask, other=0.0)


@jit
def store_columns(COMPACT, slot, begin, row, mask, x, count):
    """Scatter a block's chosen columns into rows begin + row of [tokens, count]; slot is -1 for the others."""
    base = COMPACT + begin.to(tl.int64) * count
    tl.store(
        base + (row[:, None] * count + slot[None, :]), x.to(COMPACT.dtype.element_ty), mask=mask & (slot >= 0)[None, :]
    )


@jit
def store_sum(SUMS, x, quantity, row, rows, cols, width):
    """Reduce an accumulator over its tokens into row `row` of SUMS[quantity] [rows, width]."""
    at = (quantity * rows + row).to(tl.int64) * width
    tl.store(SUMS + at + cols, tl.sum(x, 0), mask=cols < width)


def slots(index: Tensor | None, width: int) -> Tensor | None:
    """int32 [width]: where a unit's column goes in the compact copy, -1 for a unit that is not in `index`."""
    if index is None:
        return None
    slot = torch.full((width,), -1, dtype=torch.int32, device=index.device)
    slot[index] = torch.arange(index.numel(), dtype=torch.int32, device=index.device)
    return slot
