"""What two sets of neurons have in common."""

from __future__ import annotations

import torch

from .neurons import NeuronSet


def common(a: NeuronSet, b: NeuronSet) -> int:
    """Slices that both sets have. Raises UserError for sets of different models."""
    a.union(b)  # refuses them
    return sum(int(torch.isin(index, b.slices[key]).sum()) for key, index in a.slices.items() if key in b.slices)


def share(a: NeuronSet, b: NeuronSet) -> float:
    """Of a's slices, those that b has too."""
    return common(a, b) / max(1, a.count)


def jaccard(a: NeuronSet, b: NeuronSet) -> float:
    """Common slices among all slices of either."""
    both = common(a, b)
    return both / max(1, a.count + b.count - both)
