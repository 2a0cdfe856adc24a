"""What gated and plain activations share beside their formulas: what a backward is asked for, and how it is given.

A backward op returns its gradients, h, the sums [4, S, I] and two buffers of compact columns [T, k], with an empty
tensor for what was not asked for, since an op cannot return None. The sums over a sample's tokens are two scores, the
count of active tokens and the sum of h.

Columns of the gradients lie side by side in one buffer, so that one product gives the slices of gate and up and reads x
once; those of h have one of their own. Both are padded to 16 columns, which keeps rows aligned; the padding is garbage.
"""

from typing import Literal

import torch
from torch import Tensor

from .fold import Segments, check_segments

Reduce = Literal["mean_abs", "abs_sum"]
QUANTITIES = 4


def check(x: Tensor, gain: Tensor | None, route: Tensor | None, segments: Tensor | Segments | None = None) -> None:
    """Routing and samples fit x [T, I]; what does not is a caller's fault."""
    assert x.dim() == 2, f"{tuple(x.shape)}: want [T, I]"
    assert gain is not None or route is None, "route without gain"
    if gain is not None:
        assert gain.shape[1:] == x.shape[1:], f"gain {tuple(gain.shape)}: want [routes, I]"
        assert not gain.requires_grad, "gain has no gradient here: see gated_backward"
    if segments is not None:
        check_segments(segments)


def wide(x: Tensor) -> torch.dtype:
    """What x is computed and summed in: half precision in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wanted(x: Tensor, segments: Tensor | Segments | None, indices: list[Tensor | None]) -> list[Tensor | None]:
    """[sums, columns of the gradients, columns of h], uninitialised; None for what was not asked for."""
    sums = None
    if segments is not None:
        sums = x.new_empty((QUANTITIES, segments.shape[0], x.shape[1]), dtype=wide(x))
    *first, last = (None if index is None else index.shape[0] for index in indices)
    return [sums, _buffer(x, first), _buffer(x, [last])]


def as_tensors(x: Tensor, room: list[Tensor | None]) -> list[Tensor]:
    """What `wanted` gives, with an empty tensor, each its own, in the place of None: what an op can take and return."""
    sums, *columns = room
    none = x.new_empty
    return [none(0, dtype=wide(x)) if sums is None else sums, *(none(0) if c is None else c for c in columns)]


def empty(x: Tensor, segments: Tensor | Segments | None, indices: list[Tensor | None], emit_h: bool) -> list[Tensor]:
    """[h, sums, columns of the gradients, columns of h], uninitialised: what an op returns beside its gradients."""
    h = torch.empty_like(x) if emit_h else x.new_empty(0)
    return [h, *as_tensors(x, wanted(x, segments, indices))]


def _buffer(x: Tensor, widths: list[int | None]) -> Tensor | None:
    """[T, k rounded up to 16] for columns that lie side by side."""
    asked = [k for k in widths if k is not None]
    return x.new_empty((x.shape[0], (sum(asked) + 15) // 16 * 16)) if asked else None


def views(columns: list[Tensor], indices: list[Tensor | None]) -> list[Tensor | None]:
    """Each index's own columns [T, k] in the two buffers; None for what was not asked for."""
    *first, last = indices
    found, at = [], 0
    for index in first:
        found.append(None if index is None else columns[0][:, at : at + index.shape[0]])
        at += 0 if index is None else index.shape[0]
    return [*found, None if last is None else columns[1][:, : last.shape[0]]]


def buffer_of(columns: Tensor) -> Tensor:
    """[T, all k padded to 16]: the buffer that a backward's first columns [T, k] lie in, with what lies beside them."""
    return columns.as_strided((columns.shape[0], columns.stride(0)), (columns.stride(0), 1), 0)


def asked_for(
    outputs: list[Tensor], segments: Tensor | Segments | None, indices: list[Tensor | None], emit_h: bool
) -> list[Tensor | None]:
    """[*sums, h, *columns] of an op's outputs: None for what was not asked for, counts as int32."""
    h, sums, *columns = outputs
    found = [None] * QUANTITIES
    if segments is not None:
        first, second, active, total = sums.unbind()
        active = active.view(torch.int32) if active.dtype == torch.float32 else active.to(torch.int32)
        found = [first, second, active, total]
    return [*found, h if emit_h else None, *views(columns, indices)]
