"""Statistics of drawn scores: what a scoring pass of a model with such FFNs would have left."""

from types import SimpleNamespace

import torch

from slicetune.engine.scoring.statistics import Statistics


def shape_of(layers: int, width: int) -> SimpleNamespace:
    widths = {"gate": width, "up": width, "down": width // 2}
    return SimpleNamespace(layers=layers, widths=widths, fan_in=dict.fromkeys(widths, 4), intermediate=width)


def statistics_of(scores: torch.Tensor, groups: torch.Tensor, shape, names=("it", "law", "medical")) -> Statistics:
    """Statistics of scores [samples, N] in flat order."""
    stats, start = Statistics(list(names), shape), 0
    for layer in range(shape.layers):
        for projection, width in shape.widths.items():
            stats.add_scores(layer, projection, scores[:, start : start + width].contiguous(), groups)
            start += width
    stats.add_samples(groups, torch.full_like(groups, 7))
    assert start == scores.shape[1]
    return stats


def lognormal(samples: int, shape, domains: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores whose mean differs by neuron, and by domain to a degree that differs by neuron; unequal domains."""
    generator = torch.Generator().manual_seed(seed)
    count = shape.layers * sum(shape.widths.values())
    groups = torch.arange(samples) % (domains + 1) % domains
    base = torch.randn(count, generator=generator) * 2 - 14
    shift = torch.randn(domains, count, generator=generator) * torch.rand(count, generator=generator)
    noise = torch.randn(samples, count, generator=generator)
    return torch.exp(base + shift[groups] + noise), groups
