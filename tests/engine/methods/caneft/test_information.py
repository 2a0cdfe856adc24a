"""Bins of scores and mutual information against sklearn and the definitions, per neuron, in Python numbers."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from drawn import lognormal, shape_of, statistics_of
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score

from slicetune.engine.methods.caneft.information import (
    consensus,
    divergence,
    exact_bins,
    merge_bins,
    mutual_information,
)
from slicetune.engine.methods.caneft.selection import select, task_relevant
from slicetune.kernels.histogram import bins as fine_bins

READINGS = ("specific", "one_vs_rest", "joint")


def bin_by_hand(scores: list[float], bins: int, binning: str) -> list[int]:
    """Bin of each score from the definition: rank of equal scores at their middle, or steps of equal width."""
    if binning == "quantile":
        count, below, place = Counter(scores), 0, {}
        for value in sorted(count):
            place[value] = min(bins - 1, bins * (2 * below + count[value]) // (2 * len(scores)))
            below += count[value]
        return [place[value] for value in scores]
    low, high = min(scores), max(scores)
    return [min(bins - 1, math.floor(bins * (x - low) / (high - low))) if high > low else 0 for x in scores]


def middle_by_hand(score: float, lowest_octave: int = -40) -> float:
    """What a score's fine bin stands for: the middle of its eighth of an octave, 0 for the lowest bin."""
    number = min(255, int(fine_bins(torch.tensor([score]), lowest_octave)))
    return 0.0 if number == 0 else 2.0 ** (number // 8 + lowest_octave) * (1 + (number % 8 + 0.5) / 8)


def specific_by_hand(bins: list[int], groups: list[int], domain: int) -> float:
    """I(d) = Σ_b p(b|d) ln(p(b|d) / p(b))."""
    own, everyone = Counter(b for b, g in zip(bins, groups, strict=True) if g == domain), Counter(bins)
    return math.fsum(
        n / own.total() * math.log(n / own.total() / (everyone[b] / everyone.total())) for b, n in own.items()
    )


def consensus_by_hand(bins: list[int], groups: list[int], reading: str) -> float:
    domains = sorted(set(groups))
    if reading == "joint":
        return mutual_info_score(groups, bins)
    if reading == "one_vs_rest":
        return min(mutual_info_score([g == d for g in groups], bins) for d in domains)
    return min(specific_by_hand(bins, groups, d) for d in domains)


def counts_of(place: torch.Tensor, groups: torch.Tensor, bins: int) -> torch.Tensor:
    """int64 [groups, n, bins] from bins [n, samples]."""
    own = [place[:, groups == group].numpy() for group in range(int(groups.max()) + 1)]
    return torch.from_numpy(np.array([[np.bincount(row, minlength=bins) for row in each] for each in own]))


@pytest.mark.parametrize("binning", ["quantile", "equal_width"])
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("bins", [2, 7, 10])
def test_mutual_information_from_statistics_is_that_of_sklearn_on_explicit_bins(binning, reading, bins):
    shape = shape_of(2, 8)
    scores, groups = lognormal(210, shape)
    scores[:, 3] = 0.0  # a dead neuron, and one that is mostly dead
    scores[::3, 4] = 0.0
    found = mutual_information(statistics_of(scores, groups, shape), bins, binning, reading)
    assert found.dtype == torch.float64
    for neuron in range(scores.shape[1]):
        fine = [middle_by_hand(score) for score in scores[:, neuron].tolist()]
        expected = consensus_by_hand(bin_by_hand(fine, bins, binning), groups.tolist(), reading)
        assert float(found[neuron]) == pytest.approx(expected, abs=1e-11), neuron
    assert found[3] == 0
    assert found.max() > 0.01


def test_specific_information_averages_to_the_joint():
    """Σ_d p(d) I(d) = I(B; D), the identity that ties the readings of Eq. 10 to Eq. 9."""
    counts = torch.randint(0, 30, (4, 50, 10), generator=torch.Generator().manual_seed(1))
    counts[1, 7] = 0
    counts[1, 7, 3] = 5  # a domain in one bin
    each = divergence(counts.double(), counts.sum(0, keepdim=True).double())
    share = counts.sum(-1).double() / counts.sum((0, -1))
    joint = consensus(counts, "joint")
    torch.testing.assert_close((share * each).sum(0), joint, rtol=0, atol=1e-11)
    assert (consensus(counts, "specific") == torch.round(each.amin(0) * 2**40) / 2**40).all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 255), st.integers(0, 2)), min_size=3, max_size=80),
    st.integers(2, 12),
    st.sampled_from(["quantile", "equal_width"]),
)
def test_merging_bins_follows_the_definition_for_any_counts(samples, bins, binning):
    """Any histogram at all: heavy ties, empty domains' bins, everything in one bin."""
    samples += [(samples[0][0], domain) for domain in range(3)]
    counts = torch.zeros(3, 1, 256, dtype=torch.int32)
    for fine, domain in samples:
        counts[domain, 0, fine] += 1
    fine = [0.0 if b == 0 else 2.0 ** (b // 8 - 40) * (1 + (b % 8 + 0.5) / 8) for b, _ in samples]
    place = bin_by_hand(fine, bins, binning)
    if binning == "equal_width" and len(set(fine)) == 1:
        place = [bins - 1] * len(place)  # one bin in use: which number it has cannot matter
    expected = counts_of(torch.tensor([place]), torch.tensor([d for _, d in samples]), bins)
    assert torch.equal(merge_bins(counts, bins, binning, -40), expected)


@pytest.mark.parametrize("binning", ["quantile", "equal_width"])
def test_exact_bins_follow_the_definition(binning):
    scores = torch.randint(0, 12, (20, 90), generator=torch.Generator().manual_seed(2)) / 8
    scores[4] = 0.5
    groups = torch.arange(90) % 3
    place = torch.tensor([bin_by_hand(row.tolist(), 10, binning) for row in scores])
    found = exact_bins(scores, groups, binning=binning)
    assert torch.equal(found, counts_of(place, groups, 10))


def test_a_tie_is_a_tie_whatever_the_order_of_bins():
    """Domains permuted over bins give the same information up to rounding: it must not decide."""
    counts = torch.randint(1, 50, (3, 1, 10), generator=torch.Generator().manual_seed(6))
    permuted = torch.cat([counts[..., torch.randperm(10)] for _ in range(1)] + [counts.flip(-1), counts], 1)
    for reading in READINGS:
        assert len(consensus(permuted, reading).unique()) == 1


def test_streamed_deciles_agree_with_exact_ones():
    """Information from histograms and from the scores themselves, and the neurons that either chooses."""
    shape = shape_of(2, 800)
    scores, groups = lognormal(2000, shape)
    stats = statistics_of(scores, groups, shape)
    exact = consensus(exact_bins(scores.T.contiguous(), groups), "specific")
    assert 0 < (exact - mutual_information(stats)).abs().mean() <= 0.002
    each = torch.stack([scores[groups == g].double().mean(0) for g in range(3)])
    best = exact.where(task_relevant(each, 0.2, "mean"), -1).argsort(descending=True, stable=True)[:40]
    chosen = select(stats, neuron_ratio=0.01).neurons.flat()
    assert len(chosen) == 40
    assert torch.isin(chosen, best).sum() >= 38
