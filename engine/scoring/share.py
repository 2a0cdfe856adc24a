"""One rank's share of the statistics of a pass: sums over its own batches, counts of its own layers for all ranks.

The histograms of a 70B model take 21 GB. Of W ranks, rank r counts the layers r, r + W, r + 2W …; of every other layer
it gives its samples' bins, a byte a sample and neuron, to the rank that counts it, once a turn of the pass. Counts are
sums of integers: they are the same bit for bit for any number of ranks.

    share = Share(["it", "law"], shape, lowest, device, rank, world)
    share.add_sums(…); share.exchange(groups)           # once a turn, on every rank
    share.all_reduce(); share.save("statistics.safetensors", provenance)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...kernels.histogram import BINS, count
from ..common import distributed, sealed
from ..common.errors import UserError
from .statistics import FORMAT, Shape, Statistics

PART = "slicetune.statistics.part"


def owned(layers: int, rank: int, world: int) -> range:
    """The layers that a rank counts."""
    return range(rank, layers, world)


class Share(Statistics):
    """Statistics whose histograms are of the layers `here` alone: [groups, len(here), width, 256].

    `total`, `active`, `activation`, `samples`, `tokens` and the clamped are of all layers: of this rank's batches, and
    after `all_reduce` of all ranks'. With one rank it is the whole.
    """

    def __init__(
        self, groups: list[str], shape: Shape, lowest_octave: int, device: str | torch.device, rank: int, world: int
    ) -> None:
        super().__init__(groups, shape, lowest_octave, device, owned(shape.layers, rank, world))
        self.rank, self.world = rank, world
        self.leaving: dict[tuple[int, str], Tensor] = {}
        """This turn's bins of other ranks' layers, uint8 [samples, width]."""

    def _put(self, layer: int, projection: str, codes: Tensor, groups: Tensor) -> None:
        if layer in self.here:
            super()._put(layer, projection, codes, groups)
        else:
            assert (layer, projection) not in self.leaving, "two batches in one turn"
            self.leaving[layer, projection] = codes

    def exchange(self, groups: Sequence[Sequence[int]]) -> None:
        """Give the bins of this turn to the ranks that count them, and count those of this rank's layers: a collective.

        groups: of each rank's samples of this turn, none for a rank without a batch. Every rank knows them. As many
        layers as there are ranks go at once, so that no second copy of all bins is made.
        """
        if self.world == 1:
            return
        device = distributed.device()
        samples = [torch.tensor(own, dtype=torch.int32, device=device) for own in groups]
        for first in range(0, self.layers, self.world):
            sent = [self._leave(first + other, device) for other in range(self.world)]
            mine = first + self.rank
            width = sum(self.widths.values()) if mine < self.layers else 0
            sizes = [0 if other == self.rank else len(own) * width for other, own in enumerate(samples)]
            for own, received in zip(samples, distributed.exchange(sent, sizes), strict=True):
                self._count(mine, own, received)
        assert not self.leaving, "bins of unknown layers"

    def _leave(self, layer: int, device: torch.device) -> Tensor:
        """This turn's bins of one layer, projection by projection, flat: none of an own layer or without a batch."""
        found = [self.leaving.pop((layer, p)).flatten() for p in self.widths if (layer, p) in self.leaving]
        return torch.cat(found) if found else torch.empty(0, dtype=torch.uint8, device=device)

    def _count(self, layer: int, groups: Tensor, codes: Tensor) -> None:
        """Add what one rank gave of one layer of this rank's, as `_leave` has it."""
        if not codes.numel():
            return
        widths = [len(groups) * width for width in self.widths.values()]
        for projection, part in zip(self.widths, codes.split(widths), strict=True):
            counts = self._counts(layer, projection)
            count(part.view(len(groups), -1).to(counts.device), groups.to(counts.device), counts)

    def all_reduce(self) -> None:
        """Sums the small tensors over the ranks, in place; the counts stay where they are."""
        distributed.add_over_ranks(self._small().values())

    def save(self, path: str | os.PathLike[str], provenance: dict[str, Any] | None = None) -> None:
        """Writes the whole statistics on the first rank, each piece as its owner sends it: a collective.

        It comes after `all_reduce`. The file is the one that `Statistics.save` writes of the same numbers.
        """
        if self.world == 1:
            super().save(path, provenance)
            return
        self.provenance = dict(provenance if provenance is not None else self.provenance)
        coming = {p: self._sent(p) for p in self.widths}
        try:
            if self.rank == 0:
                size = (len(self.groups), self.layers)
                whole = {p: sealed.Coming(torch.int32, (*size, self.widths[p], BINS), coming[p]) for p in self.widths}
                self._write(Path(path), whole, int(self.samples.max()), FORMAT)
        finally:  # the others, and the first if it could not write: nobody is left waiting
            for pieces in coming.values():
                for _ in pieces:
                    pass

    def _sent(self, projection: str) -> Iterator[Tensor | None]:
        """Counts of one projection, by group and layer, as they come to the first rank; the others send theirs.

        A map and not a generator: that would be closed when its reader fails, and the others left waiting.
        """
        shape = (self.widths[projection], BINS)

        def piece(place: tuple[int, int]) -> Tensor | None:
            group, layer = place
            counts = self._counts(layer, projection)
            own = None if counts is None else counts[group]
            return distributed.hand_to_first(layer % self.world, own, shape, torch.int32)

        return map(piece, product(range(len(self.groups)), range(self.layers)))

    def save_part(self, path: Path) -> None:
        """Writes what this rank has, in the middle of a pass; `take` reads it."""
        most = max((int(c[:, 0, 0].sum(-1).max()) for c in self.histogram.values() if c.numel()), default=0)
        self._write(path, self.histogram, most, PART)

    def take(self, parts: Sequence[Path]) -> None:
        """Go on from what all ranks of a broken pass saved, `parts` in their order; this share is empty before.

        The ranks can be more or fewer than now: of each layer the counts are read from who had them; the sums of rank
        r of then go to rank r % ranks of now, so that with as many ranks every rank has its own. Raises UserError
        naming a file that is not such a part.
        """
        for old, path in enumerate(parts):
            try:
                with safe_open(path, framework="pt") as file:
                    if old % self.world == self.rank:
                        sealed.add(file, self._small())
                    self._take_counts(file, owned(self.layers, old, len(parts)))
            except (SafetensorError, KeyError, ValueError, RuntimeError, OSError) as error:
                remedy = "delete the folder it lies in, and score again"
                raise UserError(f"{path}: not readable as a part of statistics ({error}): {remedy}") from error
