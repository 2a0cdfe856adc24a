"""What the plain-torch paths of the kernels share: blocks that stay in a core's cache, and the sums of samples."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .activations import fused_pull, fused_value
from .fold import COUNTED, Segments, host_tiles, segment_sums
from .outputs import Reduce, views, wide

# Elements of one block of the torch path: its dozen temporaries stay in the cache of a core.
CPU_BLOCK = 1 << 17


@dataclass
class Block:
    """Neighbouring tokens that are computed at once; its tiles each lie in one sample, or outside of all.

    Activations and sums go by tiles, which depend on nothing but the sample, so that it gets the same bits alone and
    in any batch (torch's vector kernels end in scalar ones, whose exponential differs in the last bit). Products are
    the same everywhere: they take the whole block, since a call for each short sample would cost more than its work.
    """

    rows: slice
    tiles: list[tuple[slice, int]]
    """Of the block's own rows, and the sample; -1 outside."""

    def value(self, x: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
        """act(x)."""
        out = torch.empty_like(x) if out is None else out
        for tile, _ in self.tiles:
            fused_value(x[tile], activation, out[tile])
        return out

    def pull(self, grad: Tensor, x: Tensor, activation: str, out: Tensor) -> Tensor:
        """grad · act'(x) into out, which may be grad or x."""
        for tile, _ in self.tiles:
            fused_pull(grad[tile], x[tile], activation, out[tile])
        return out

    def add_sums(self, sums: Tensor, *values: Tensor) -> None:
        """Add values [tokens, I] of each quantity to sums [quantities, S, I]."""
        for tile, sample in self.tiles:
            if sample >= 0:
                for into, x in zip(sums[:, sample], values, strict=True):
                    into += x[tile].sum(0)


def blocks_of(x: Tensor, segments: Tensor | Segments | None = None) -> list[Block]:
    """The tokens of x [T, I] in blocks."""
    tokens, width = x.shape
    most = max(1, CPU_BLOCK // max(width, 1))
    blocks: list[Block] = []
    for begin, end, sample in host_tiles(segments, tokens, most):
        if not blocks or end - blocks[-1].rows.start > most:
            blocks.append(Block(slice(begin, end), []))
        start = blocks[-1].rows.start
        blocks[-1].rows = slice(start, end)
        blocks[-1].tiles.append((slice(begin - start, end - start), sample))
    return blocks


def compute(x: Tensor) -> Tensor:
    """Half precision is computed in float32, float64 stays."""
    return x.to(wide(x))


def gain_rows(gain: Tensor | None, route: Tensor | None, rows: slice = slice(None)) -> Tensor | None:
    """The gain of these tokens, [tokens, I] or [1, I]; None without routing."""
    if gain is None:
        return None
    return gain[:1] if route is None else gain[route[rows]]


def positive(x: Tensor) -> Tensor:
    """1 where x > 0 and 0 elsewhere, in x's dtype: a third of the time that a comparison to bool takes."""
    return torch.gt(x, 0, out=torch.empty_like(x))


def count_as_bits(sums: Tensor) -> None:
    """The count among the sums as a kernel leaves it: int32 bits in the place of a float32."""
    if sums.dtype == torch.float32:
        sums[COUNTED].view(torch.int32).copy_(sums[COUNTED].to(torch.int32))


def copy_columns(into: list[Tensor], sources: tuple[Tensor, ...], indices: list[Tensor | None], rows: slice) -> None:
    """A block's chosen columns into the compact copies."""
    for compact, x, index in zip(views(into, indices), sources, indices, strict=True):
        if index is not None:
            compact[rows] = x[:, index].to(compact.dtype)


def reference_sums(
    first: Tensor, second: Tensor, on: Tensor, h: Tensor, segments: Tensor | Segments | None, reduce: Reduce
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
