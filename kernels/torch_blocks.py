"""What the plain-torch paths of the kernels share: blocks that stay in a core's cache, and the sums of a sample."""

import torch
from torch import Tensor

from .fold import segment_sums
from .outputs import Reduce, wide

# Elements of one block: its dozen temporaries stay in the cache of a core.
CPU_BLOCK = 1 << 17


def block_rows(width: int) -> int:
    """Tokens of one block."""
    return max(1, CPU_BLOCK // max(width, 1))


def compute(x: Tensor) -> Tensor:
    """Half precision is computed in float32, float64 stays."""
    return x.to(wide(x))


def gain_rows(gain: Tensor | None, route: Tensor | None, begin: int, end: int) -> Tensor | None:
    """The gain of tokens [begin, end), [tokens, I] or [1, I]; None without routing."""
    if gain is None:
        return None
    return gain[:1] if route is None else gain[route[begin:end]]


def add_sums(into: Tensor, first: Tensor, second: Tensor, on: Tensor, h: Tensor, signed: bool) -> None:
    """Add a block's tokens to a sample's sums [4, I]: two scores, the count of active tokens, h."""
    into[0] += (first if signed else first.abs_()).sum(0)
    into[1] += (second if signed else second.abs_()).sum(0)
    into[2] += on.sum(0)
    into[3] += h.sum(0)


def copy_columns(into: list[Tensor], sources: tuple[Tensor, ...], indices: list[Tensor | None], rows: slice) -> None:
    """A block's chosen columns into the compact copies."""
    for compact, x, index in zip(into, sources, indices, strict=True):
        if index is not None:
            compact[rows] = x[:, index].to(compact.dtype)


def reference_sums(
    first: Tensor, second: Tensor, on: Tensor, h: Tensor, segments: Tensor | None, reduce: Reduce
) -> list[Tensor | None]:
    """The specification of a backward's sums over each sample's tokens; None where there are no samples."""
    if segments is None:
        return [None] * 4
    size = torch.abs if reduce == "mean_abs" else torch.clone
    active = segment_sums(on.int(), segments).int()
    return [
        segment_sums(size(first), segments),
        segment_sums(size(second), segments),
        active,
        segment_sums(h, segments),
    ]


def reference_columns(
    sources: tuple[Tensor, ...], indices: tuple[Tensor | None, ...], dtype: torch.dtype
) -> list[Tensor | None]:
    """The specification of compact columns."""
    return [None if index is None else x[:, index].to(dtype) for x, index in zip(sources, indices, strict=True)]
