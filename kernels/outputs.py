"""What gated and plain activations share beside their formulas: what a backward is asked for, and how it is given.

A backward op returns its gradients, h, the sums [4, S, I] and the compact columns [T, k], with an empty tensor for
what was not asked for, since an op cannot return None. The sums over a sample's tokens are two scores, the count of
active tokens and the sum of h.
"""

from typing import Literal

import torch
from torch import Tensor

from .fold import check_segments

Reduce = Literal["mean_abs", "abs_sum"]
QUANTITIES = 4


def check(x: Tensor, gain: Tensor | None, route: Tensor | None, segments: Tensor | None = None) -> None:
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


def empty(x: Tensor, segments: Tensor | None, indices: list[Tensor | None], emit_h: bool) -> list[Tensor]:
    """[h, sums, *columns], uninitialised."""
    h = torch.empty_like(x) if emit_h else x.new_empty(0)
    shape = (0,) if segments is None else (QUANTITIES, segments.shape[0], x.shape[1])
    columns = [x.new_empty((0,) if index is None else (x.shape[0], index.numel())) for index in indices]
    return [h, x.new_empty(shape, dtype=wide(x)), *columns]


def asked_for(
    outputs: list[Tensor], segments: Tensor | None, indices: list[Tensor | None], emit_h: bool
) -> list[Tensor | None]:
    """[*sums, h, *columns] of an op's [h, sums, *columns]: None for what was not asked for, counts as int32."""
    h, sums, *columns = outputs
    if segments is None:
        found = [None] * QUANTITIES
    else:
        first, second, active, total = sums
        found = [first, second, active.to(torch.int32), total]
    return [
        *found,
        h if emit_h else None,
        *(x if i is not None else None for x, i in zip(columns, indices, strict=True)),
    ]
