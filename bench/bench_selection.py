"""Mutual information and selection for every neuron of Llama-3.1-8B from streamed histograms, and neuron by neuron.

    python bench/run.py cpu bench_selection.py

The baseline is what one writes with scikit-learn: quantile bins of a neuron's 40,000 scores, then mutual_info_score
with the domains, in a loop. It is timed on a sample of neurons and extrapolated, and labelled so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from harness import Comparison, Contender, Wrong
from shapes import SELECTION, SELECTION_SAMPLES, SMOKE
from torch import Tensor

from slicetune.engine.methods.caneft.information import mutual_information
from slicetune.engine.methods.caneft.selection import select
from slicetune.engine.methods.caneft.settings import Caneft
from slicetune.engine.scoring.statistics import Statistics

DOMAINS = ["a", "b", "c", "d"]
SAMPLE = 16 if SMOKE else 256
"""Neurons that the baseline is timed on."""
TEMPLATES = 256


def log_normal(rows: int, seed: int) -> Tensor:
    """Scores [rows, samples] of neurons that differ in scale and spread."""
    draw = torch.Generator().manual_seed(seed)
    centre = torch.empty(rows, 1).uniform_(-16, -10, generator=draw)
    spread = torch.empty(rows, 1).uniform_(0.5, 1.5, generator=draw)
    return (centre + spread * torch.randn(rows, SELECTION_SAMPLES, generator=draw)).exp()


def filled() -> Statistics:
    """Counts of every neuron and domain, each of SELECTION_SAMPLES sentences, drawn from a few hundred histograms."""
    statistics = Statistics(DOMAINS, SELECTION)
    scores = log_normal(TEMPLATES, seed=0)
    templates = torch.stack([torch.bincount(_bins(row), minlength=256) for row in scores]).to(torch.int32)
    means = scores.double().mean(1)
    draw = torch.Generator().manual_seed(2)
    for projection, counts in statistics.histogram.items():
        for layer in range(SELECTION.layers):
            # A neuron's domains are neighbours of one template: they overlap, more or less.
            first = torch.randint(TEMPLATES - 8, (counts.shape[2],), generator=draw)
            for domain in range(len(DOMAINS)):
                pick = first + torch.randint(8, first.shape, generator=draw)
                counts[domain, layer] = templates[pick]
                statistics.total[projection][domain, layer] = means[pick] * SELECTION_SAMPLES
    statistics.samples += SELECTION_SAMPLES
    statistics.tokens += 100 * SELECTION_SAMPLES
    return statistics


def _bins(scores: Tensor) -> Tensor:
    from slicetune.kernels.histogram import bins

    return bins(scores, -40).to(torch.int64)


def by_sklearn(scores: Tensor, domains: Tensor, bins: int = 10) -> list[float]:
    """Mutual information in nats of each row's quantile bins with the domains, one neuron after another."""
    import numpy as np
    from sklearn.metrics import mutual_info_score

    labels, found = domains.numpy(), []
    for row in scores.numpy():
        inner = np.quantile(row, np.linspace(0, 1, bins + 1))[1:-1]
        found.append(float(mutual_info_score(labels, np.digitize(row, inner))))
    return found


def check(scores: Tensor, domains: Tensor) -> float:
    """Streamed MI of the sampled neurons against scikit-learn's; returns the mean difference in nats."""
    shape = type("Shape", (), {"layers": 1, "widths": {"gate": len(scores)}, "fan_in": {"gate": 1}, "intermediate": 1})
    statistics = Statistics(DOMAINS, shape())
    statistics.add_scores(0, "gate", scores.t().contiguous(), domains)
    statistics.add_samples(domains, torch.ones_like(domains))
    streamed = mutual_information(statistics, reading="joint")
    difference = (streamed - torch.tensor(by_sklearn(scores, domains), dtype=torch.float64)).abs()
    if not float(difference.max()) < (0.05 if SMOKE else 0.02):
        raise Wrong(f"streamed and exact mutual information differ by {float(difference.max()):.3f} nats")
    return float(difference.mean())


def _free_memory() -> float:
    """Bytes that could be had, the page cache included."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else []
    found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    return found[0] if found else float("inf")


def test_selection(benchmark):
    neurons, sentences = SELECTION.neurons, len(DOMAINS) * SELECTION_SAMPLES
    setting = f"{neurons:,} neurons × {len(DOMAINS)} domains × {sentences:,} samples in all"

    def extrapolated(row: dict[str, Any]) -> dict[str, Any]:
        if row["neurons"] != SAMPLE:
            return {}
        whole = row["seconds"] / SAMPLE * neurons
        return {"extrapolated_seconds": whole, "note": f"{whole:,.0f} s for all neurons, extrapolated"}

    comparison = Comparison(benchmark, "selection", setting, derive=extrapolated)
    scores = torch.cat([log_normal(SAMPLE, seed=10 + d) * 1.1**d for d in range(len(DOMAINS))], 1)
    domains = torch.arange(len(DOMAINS)).repeat_interleave(SELECTION_SAMPLES)

    def ours() -> Contender:
        difference = check(scores, domains)
        free, needed = _free_memory(), 1.4 * len(DOMAINS) * neurons * 1024
        if free < needed:
            raise Wrong(f"needs {needed / 1e9:.1f} GB of free memory, {free / 1e9:.1f} here")
        statistics = filled()
        method = Caneft()
        chosen = select(statistics, **vars(method)).neurons.count
        facts = {"neurons": neurons, "chosen": chosen, "mean_difference_nats": difference}
        return Contender(lambda: select(statistics, **vars(method)), facts=facts)

    def loop() -> Contender:
        return Contender(lambda: by_sklearn(scores, domains), facts={"neurons": SAMPLE})

    comparison.add("ours: filter, MI, top 1 % of all neurons", ours, "ours")
    comparison.add(f"scikit-learn loop over {SAMPLE} neurons", loop)
    comparison.measure(20)
