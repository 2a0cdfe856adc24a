"""Histograms against numpy's own decomposition of the scores (kernel: test_slices_triton.py)."""

import numpy as np
import pytest
import torch

from slicetune.kernels import histogram
from slicetune.kernels.common.dispatch import INTERPRET


def expected(scores: torch.Tensor, groups: torch.Tensor, counts: torch.Tensor, lowest: int) -> torch.Tensor:
    """Counts by frexp instead of bits, in a plain loop."""
    out = counts.clone()
    for row, group in zip(scores.double().numpy(), groups.tolist(), strict=True):
        for neuron, score in enumerate(row):
            b = 0
            if np.isnan(score) or np.isposinf(score):
                b = 255
            elif score > 0:
                mantissa, exponent = np.frexp(score)  # score = mantissa · 2**exponent, mantissa in [0.5, 1)
                octave = exponent - 1 - lowest
                b = int(np.clip(8 * octave + np.floor((2 * mantissa - 1) * 8), 0, 255))
            out[group, neuron, b] += 1
    return out


def example(samples: int, neurons: int, groups: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    scores = (torch.randn(samples, neurons, generator=g) * 6 - 8).exp2()
    return scores, torch.randint(groups, (samples,), generator=g), torch.zeros(groups, neurons, 256, dtype=torch.int32)


@pytest.mark.parametrize(
    ("samples", "neurons", "groups", "lowest"),
    [(1, 1, 1, -40), (9, 77, 3, -40), (33, 32, 2, -20), (5, 130, 4, -12), (3, 64, 3, -126), (3, 64, 3, 96)],
)
def test_counts(samples, neurons, groups, lowest):
    scores, group, counts = example(samples, neurons, groups)
    counts += torch.arange(256, dtype=torch.int32)  # adds to what is there
    want = expected(scores, group, counts, lowest)
    histogram.accumulate(scores, group, counts, lowest)
    assert torch.equal(counts, want)


def test_edge_values():
    """Zero, subnormal and what lies below fall in bin 0, infinity, NaN and what lies above in bin 255."""
    values = [0.0, -0.0, 1e-42, 2.0**-41, 2.0**-40, 2.0**-40 * 1.1249, 2.0**-40 * 1.125, 0.99 * 2.0**-8, 2.0**-8, 1e30]
    scores = torch.tensor([*values, float("inf"), float("nan")])[None]
    counts = torch.zeros(1, scores.shape[1], 256, dtype=torch.int32)
    histogram.accumulate(scores, torch.zeros(1, dtype=torch.int64), counts, -40)
    assert counts[0].argmax(1).tolist() == [0, 0, 0, 0, 0, 0, 1, 255, 255, 255, 255, 255]
    assert counts.sum() == scores.numel()


def test_bins_lie_between_their_edges():
    edges = histogram.edges(-40)
    assert edges[0] == 2.0**-40
    assert edges[255] == 2.0**-9 * 1.875
    scores = (torch.rand(4000, dtype=torch.float64) * 30 - 39).exp2()
    code = histogram.bins(scores.float(), -40).long()
    assert (edges[code] <= scores.float().double()).all()
    assert (scores.float().double() < torch.cat([edges, edges[-1:] * 2])[code + 1]).all()


def test_groups_of_every_integer_type_and_non_contiguous_scores():
    scores, group, counts = example(6, 40, 3)
    want = expected(scores, group, counts, -40)
    for kind in (torch.int32, torch.int64, torch.uint8):
        counts.zero_()
        histogram.accumulate(scores.t().contiguous().t(), group.to(kind), counts, -40)
        assert torch.equal(counts, want)


def test_chunks_of_neurons(monkeypatch):
    monkeypatch.setattr(histogram, "_CHUNK", 50)
    scores, group, counts = example(7, 33, 2)
    histogram.accumulate_reference(scores, group, counts, -40)
    assert torch.equal(counts, expected(scores, group, torch.zeros_like(counts), -40))


@pytest.mark.parametrize(("samples", "neurons", "groups"), [(1, 1, 1), (9, 77, 3), (33, 32, 2), (5, 130, 4)])
def test_bins_of_another_rank_are_counted(samples, neurons, groups, monkeypatch):
    """A plain loop over given bins, of every integer type of the groups; in chunks; added to what is there."""
    monkeypatch.setattr(histogram, "_CHUNK", 100)
    _, group, counts = example(samples, neurons, groups)
    codes = torch.randint(256, (samples, neurons), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    counts += torch.arange(256, dtype=torch.int32)
    want = counts.clone()
    for s in range(samples):
        for n in range(neurons):
            want[group[s], n, int(codes[s, n])] += 1
    for kind in (torch.int64, torch.int32, torch.uint8):
        got = counts.clone()
        histogram.count(codes.t().contiguous().t(), group.to(kind), got)
        assert torch.equal(got, want)


def test_nothing_to_count():
    counts = torch.zeros(2, 5, 256, dtype=torch.int32)
    histogram.accumulate(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), counts, -40)
    assert counts.sum() == 0
    histogram.count(torch.zeros(0, 5, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), counts)
    assert counts.sum() == 0
    histogram.accumulate(torch.zeros(3, 0), torch.zeros(3, dtype=torch.int64), torch.zeros(2, 0, 256).int(), -40)


@pytest.mark.parametrize("lowest", [-127, 97])
def test_range_is_checked(lowest):
    with pytest.raises(ValueError, match="lowest_octave"):
        histogram.bins(torch.zeros(1), lowest)


@pytest.mark.skipif(not INTERPRET, reason="statistics.py has the torch path, and its tests")
@pytest.mark.parametrize("reduce", ["mean_abs", "abs_sum"])
@pytest.mark.parametrize("here", [True, False])
def test_sums_become_statistics_in_one_launch(reduce, here):
    """Scores, bins, totals and what lies outside, against the same in plain torch; and where counts lie elsewhere."""
    scores, group, counts = example(9, 70, 3)
    sums = scores * torch.randn(9, 1).sign() if reduce == "abs_sum" else scores
    sums[0, :3] = torch.tensor([0.0, 2.0**-45, 2.0**10])
    lengths = torch.arange(3.0, 12.0)
    score = sums / lengths[:, None] if reduce == "mean_abs" else sums.abs()
    whole = torch.ones(3, 2, 70, dtype=torch.float64)
    low, high = torch.tensor(5), torch.tensor(7)
    into = histogram.Into(whole[:, 1], low, high, counts if here else None)
    codes = histogram.add_scores(sums, lengths if reduce == "mean_abs" else None, group.int(), into, -20)
    if here:
        assert codes is None
        assert torch.equal(counts, expected(score, group, torch.zeros_like(counts), -20))
    else:
        assert torch.equal(codes, histogram.bins(score, -20))
    want = torch.stack([score[group == g].double().sum(0) for g in range(3)])
    assert torch.allclose(whole[:, 1] - 1, want, rtol=1e-14)
    assert torch.equal(whole[:, 0], torch.ones(3, 70, dtype=torch.float64))
    assert low == 5 + ((score > 0) & (score < 2.0**-20)).sum()
    assert high == 7 + (score >= 2.0**12).sum()


@pytest.mark.skipif(not INTERPRET, reason="statistics.py has the torch path, and its tests")
def test_units_in_one_launch():
    group, lengths = torch.tensor([1, 0, 1, 2]), torch.tensor([3.0, 5.0, 2.0, 7.0])
    active, activation = torch.randint(0, 9, (4, 70), dtype=torch.int32), torch.randn(4, 70)
    counts, total = torch.ones(3, 2, 70, dtype=torch.int64), torch.zeros(3, 2, 70, dtype=torch.float64)
    histogram.add_units(active, activation, lengths, group.int(), counts[:, 1], total[:, 1])
    for g in range(3):
        assert torch.equal(counts[g, 1] - 1, active[group == g].sum(0))
        mean = activation[group == g] / lengths[group == g][:, None]
        assert torch.allclose(total[g, 1], mean.double().sum(0), rtol=1e-14)
