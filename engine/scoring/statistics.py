"""Streaming statistics of neurons, per group of sentences: histograms of scores, sums, counts of activity.

Keeping every sample's scores of an 8B model would take 84 GB at 40,000 sentences. A histogram over fixed bins
(the exponent and the leading three mantissa bits of the float32 score) takes 4.3 GB whatever the number of
sentences, is a sum of integers, and so is the same bit for bit in any order of samples, batches and ranks.

    stats = Statistics(["it", "law"], shape)
    stats.add_scores(layer, "gate", scores, groups)     # every layer and projection of a batch
    stats.add_samples(groups, tokens)                   # once a batch
    stats.all_reduce(); stats.save("statistics.safetensors", provenance)

A pass of several ranks fills a Share of it (share.py), which has the histograms of some layers alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import one_hot

from ...kernels.common.dispatch import use_triton
from ...kernels.histogram import BINS, HIGHEST, LOWEST, OCTAVES, Into, accumulate, add_scores, add_units, bins, count
from ..common import __version__, distributed, sealed
from ..common.errors import UserError

FORMAT = "slicetune.statistics"


class Shape(Protocol):
    """What of a model's shape the statistics need; `shapes.ModelShape`, Statistics and NeuronSet have it."""

    layers: int
    widths: dict[str, int]
    fan_in: dict[str, int]


class Statistics:
    """Sums over sentences, per group. All attributes are plain tensors, empty (zero) at first:

    histogram[projection]  int32   [groups, layers, width, 256]   sentences by bin of their score
    total[projection]      float64 [groups, layers, width]        sum of scores
    samples, tokens        int64   [groups]
    active                 int64   [groups, layers, intermediate] tokens at which the unit is active
    activation             float64 [groups, layers, intermediate] sum over sentences of the unit's mean activation
    clamped_low, clamped_high  int64 []  scores outside the histogram's range (an exact zero is not outside)

    The histograms stay on `device`; the small tensors move to where the scores come from. `here` are the layers that
    histograms are kept of: all, or those of a Share.
    """

    def __init__(
        self,
        groups: list[str],
        shape: Shape,
        lowest_octave: int = -40,
        device: str | torch.device = "cpu",
        here: range | None = None,
    ) -> None:
        if not LOWEST <= lowest_octave <= HIGHEST:
            raise UserError(f"a histogram from 2^{lowest_octave}: must begin between 2^{LOWEST} and 2^{HIGHEST}")
        if len(set(groups)) != len(groups):
            raise UserError(f"--data.seen {' '.join(groups)}: names a domain twice")
        self.groups, self.lowest_octave = list(groups), lowest_octave
        self.layers, self.widths, self.fan_in = shape.layers, dict(shape.widths), dict(shape.fan_in)
        self.intermediate = shape.intermediate
        self.here = range(self.layers) if here is None else here
        self.provenance: dict[str, Any] = {}
        size = (len(groups), self.layers)
        self.histogram = {  # a layer's counts lie together: histogram[projection][:, layer] is contiguous
            p: torch.zeros(len(self.here), len(groups), w, BINS, dtype=torch.int32, device=device).transpose(0, 1)
            for p, w in self.widths.items()
        }
        self.total = {p: torch.zeros(*size, w, dtype=torch.float64) for p, w in self.widths.items()}
        self.samples = torch.zeros(len(groups), dtype=torch.int64)
        self.tokens = torch.zeros(len(groups), dtype=torch.int64)
        self.active = torch.zeros(*size, self.intermediate, dtype=torch.int64)
        self.activation = torch.zeros(*size, self.intermediate, dtype=torch.float64)
        self.clamped_low = torch.zeros((), dtype=torch.int64)
        self.clamped_high = torch.zeros((), dtype=torch.int64)

    @property
    def neurons(self) -> int:
        """Neurons of all layers and projections."""
        return self.layers * sum(self.widths.values())

    @property
    def bytes(self) -> int:
        """Of the file that `save` writes, at most."""
        return sum(t.numel() * t.element_size() for t in (*self.histogram.values(), *self._small().values()))

    @property
    def clamped_share(self) -> float:
        """Share of all scores that lay outside the histogram's 32 octaves."""
        scored = int(self.samples.sum()) * self.neurons
        return int(self.clamped_low + self.clamped_high) / scored if scored else 0.0

    def add_scores(self, layer: int, projection: str, scores: Tensor, groups: Tensor) -> None:
        """Counts the scores of one projection of one layer.

        scores: float32 [samples, width], not negative (CANEFT Eq. 8); groups: int64 [samples], on the same device.
        Where the counts live elsewhere, bins are computed beside the scores and moved: a byte a sample and neuron.
        """
        assert scores.dtype == torch.float32, scores.dtype
        assert scores.shape == (len(groups), self.widths[projection]), (scores.shape, projection)
        self._follow(scores.device)
        counts = self._counts(layer, projection)
        if counts is not None and counts.device == scores.device:
            accumulate(scores, groups, counts, self.lowest_octave)
        else:
            self._put(layer, projection, bins(scores, self.lowest_octave), groups)
        self.total[projection][:, layer] += by_group(scores, groups, len(self.groups))
        self.clamped_low += ((scores > 0) & (scores < 2.0**self.lowest_octave)).sum()
        self.clamped_high += (scores >= 2.0 ** (self.lowest_octave + OCTAVES)).sum()

    def add_sums(
        self, layer: int, projection: str, sums: Tensor, lengths: Tensor, groups: Tensor, reduce: str = "mean_abs"
    ) -> None:
        """Counts the scores of one projection of one layer from each sample's sums: one launch on a GPU.

        sums: float32 [samples, width], as the FFN's backward leaves them; lengths: float32 [samples], tokens that were
        summed; groups: integer [samples]. `mean_abs` divides by the lengths, `abs_sum` takes the absolute value.
        """
        if not use_triton(sums):
            scores = sums / lengths[:, None] if reduce == "mean_abs" else sums.abs()
            self.add_scores(layer, projection, scores, groups.long())
            return
        self._follow(sums.device)
        counts = self._counts(layer, projection)
        here = counts is not None and counts.device == sums.device
        into = Into(self.total[projection][:, layer], self.clamped_low, self.clamped_high, counts if here else None)
        codes = add_scores(sums, lengths if reduce == "mean_abs" else None, groups, into, self.lowest_octave)
        if codes is not None:
            self._put(layer, projection, codes, groups)

    def _counts(self, layer: int, projection: str) -> Tensor | None:
        """The counts [groups, width, 256] of one projection of one layer, if they are kept here."""
        return self.histogram[projection][:, self.here.index(layer)] if layer in self.here else None

    def _put(self, layer: int, projection: str, codes: Tensor, groups: Tensor) -> None:
        """Count bins, uint8 [samples, width], of scores whose counts lie on another device."""
        counts = self._counts(layer, projection)
        assert counts is not None, f"the counts of layer {layer} are not kept here"
        count(codes.to(counts.device), groups.to(counts.device), counts)

    def add_units(self, layer: int, active: Tensor, activation: Tensor, lengths: Tensor, groups: Tensor) -> None:
        """Counts the activity of one layer's intermediate units: one launch on a GPU.

        active: int32 [samples, intermediate], tokens of the sample with g > 0; activation: float32 of the same shape,
        the sum of h over the sample's tokens; lengths: float32 [samples]; groups: integer [samples].
        """
        self._follow(active.device)
        if use_triton(activation):
            add_units(active, activation, lengths, groups, self.active[:, layer], self.activation[:, layer])
            return
        count, groups = len(self.groups), groups.long()
        self.active[:, layer] += by_group(active, groups, count).to(torch.int64)  # exact: far below 2^53
        self.activation[:, layer] += by_group(activation / lengths[:, None], groups, count)

    def add_samples(self, groups: Tensor, tokens: Tensor) -> None:
        """Counts sentences and their tokens (int64 [samples] each); call it once a batch."""
        self._follow(groups.device)
        self.samples.index_add_(0, groups, torch.ones_like(groups))
        self.tokens.index_add_(0, groups, tokens.to(torch.int64))

    def _small(self) -> dict[str, Tensor]:
        """Everything but the histograms, by the name it has on disk."""
        names = ("samples", "tokens", "active", "activation", "clamped_low", "clamped_high")
        return {f"total.{p}": t for p, t in self.total.items()} | {name: getattr(self, name) for name in names}

    def _follow(self, device: torch.device) -> None:
        if self.samples.device == device:
            return
        for name, tensor in self._small().items():
            if name.startswith("total."):
                self.total[name.removeprefix("total.")] = tensor.to(device)
            else:
                setattr(self, name, tensor.to(device))

    def all_reduce(self) -> None:
        """Sums over the ranks of torch.distributed, in place; does nothing where it is not initialised.

        A piece of 15 MB at a time, so that counts on the host pass through NCCL without a second copy of them.
        """
        pieces = [piece for counts in self.histogram.values() for piece in sealed.pieces(counts)]
        distributed.add_over_ranks([*self._small().values(), *pieces])

    def save(self, path: str | os.PathLike[str], provenance: dict[str, Any] | None = None) -> None:
        """Writes a sealed safetensors file, renamed into place.

        Histograms are written as uint16 where no group has more sentences than that holds: 2.1 GB instead of 4.3.
        """
        self.provenance = dict(provenance if provenance is not None else self.provenance)
        self._write(Path(path), self.histogram, int(self.samples.max()), FORMAT)

    def _write(self, path: Path, histogram: Mapping[str, Tensor | sealed.Coming], most: int, kind: str) -> None:
        """`histogram` and the small tensors as a sealed file of that kind; no count is above `most`."""
        counts = {f"histogram.{p}": counts for p, counts in histogram.items()}
        about = {"groups": self.groups, "lowest_octave": self.lowest_octave, "layers": self.layers}
        about |= {"widths": self.widths, "fan_in": self.fan_in, "intermediate": self.intermediate}
        metadata = {"format": kind, "about": json.dumps(about), "provenance": json.dumps(self.provenance)}
        metadata["slicetune"] = __version__
        narrow = torch.uint16 if most < 2**16 else torch.int32
        sealed.write(path, self._small() | counts, metadata, dict.fromkeys(counts, narrow))

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Statistics:
        """Reads what `save` wrote; histograms go to `device` piece by piece. Raises UserError naming the file."""
        return cls._read(path, device, None)

    @classmethod
    def sums(cls, path: str | os.PathLike[str]) -> Statistics:
        """Reads what `save` wrote without the histograms: these are of no layer. Raises UserError as `load` does."""
        return cls._read(path, "cpu", range(0))

    @classmethod
    def _read(cls, path: str | os.PathLike[str], device: str | torch.device, here: range | None) -> Statistics:
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file; run the scoring stage, which writes statistics.safetensors")
        sealed.check(Path(path), FORMAT, "delete it and score again")
        try:
            with safe_open(path, framework="pt") as file:
                return cls._from_file(file, device, here)
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, MemoryError) as error:
            raise UserError(f"{path}: not readable as statistics ({error}); score again") from error

    @classmethod
    def _from_file(cls, file: Any, device: str | torch.device, here: range | None) -> Statistics:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
        about = json.loads(metadata["about"])
        stats = cls(about.pop("groups"), _Namespace(about), about.pop("lowest_octave"), device, here)
        stats.provenance = json.loads(metadata["provenance"])
        sealed.add(file, stats._small())
        stats._take_counts(file, range(stats.layers))
        return stats

    def _take_counts(self, file: Any, layers: range) -> None:
        """Read those counts of an open file, which has `layers`, that are kept here; ValueError for another shape."""
        for projection, width in self.widths.items():
            stored = file.get_slice(f"histogram.{projection}")
            if stored.get_shape() != (wanted := [len(self.groups), len(layers), width, BINS]):
                raise ValueError(f"histogram.{projection} is {stored.get_shape()}, not {wanted}")
            for at, layer in enumerate(layers):
                if (counts := self._counts(layer, projection)) is not None:
                    for group in range(len(self.groups)):
                        counts[group] = stored[group, at].to(torch.int32).to(counts.device)


def by_group(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """float64 [count, width]: values [samples, width] summed by group, in a fixed order (no atomics)."""
    return one_hot(groups, count).T.to(torch.float64) @ values.to(torch.float64)


class _Namespace:
    """A stored shape, as attributes."""

    def __init__(self, about: dict[str, Any]) -> None:
        self.layers, self.intermediate = int(about["layers"]), int(about["intermediate"])
        self.widths, self.fan_in = dict(about["widths"]), dict(about["fan_in"])
