"""Selection: mutual information against sklearn, the task filter against sets, ties, rounding, refusals.

References are written from the definitions, per neuron, in Python numbers or with sklearn.
"""

import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from sklearn.metrics import mutual_info_score

from slicetune.engine import selection
from slicetune.engine.errors import UserError
from slicetune.engine.methods.caneft import Caneft
from slicetune.engine.neurons import NeuronSet
from slicetune.engine.select import main
from slicetune.engine.selection import consensus, exact_bins, merge_bins, select, share_of, task_relevant
from slicetune.engine.statistics import Statistics
from slicetune.kernels.histogram import bins as fine_bins

OPEN = {"task_ratio": None}
READINGS = ("specific", "one_vs_rest", "joint")


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
    found = selection.mutual_information(
        statistics_of(scores, groups, shape), Caneft(bins=bins, binning=binning, consensus=reading)
    )
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
    each = selection.divergence(counts.double(), counts.sum(0, keepdim=True).double())
    share = counts.sum(-1).double() / counts.sum((0, -1))
    joint = consensus(counts, Caneft(consensus="joint"))
    torch.testing.assert_close((share * each).sum(0), joint, rtol=0, atol=1e-11)
    assert (consensus(counts, Caneft(consensus="specific")) == torch.round(each.amin(0) * 2**40) / 2**40).all()


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
    assert torch.equal(merge_bins(counts, Caneft(bins=bins, binning=binning), -40), expected)


@pytest.mark.parametrize("binning", ["quantile", "equal_width"])
def test_exact_bins_follow_the_definition(binning):
    scores = torch.randint(0, 12, (20, 90), generator=torch.Generator().manual_seed(2)) / 8
    scores[4] = 0.5
    groups = torch.arange(90) % 3
    place = torch.tensor([bin_by_hand(row.tolist(), 10, binning) for row in scores])
    found = exact_bins(scores, groups, Caneft(binning=binning))
    assert torch.equal(found, counts_of(place, groups, 10))


@pytest.mark.parametrize("merge", ["mean", "intersection", "union"])
@pytest.mark.parametrize("ratio", [0.05, 0.3, 1.0])
def test_task_filter_is_that_of_sets(merge, ratio):
    each = torch.randint(0, 40, (3, 60), generator=torch.Generator().manual_seed(3)).double()  # many ties
    found = set(task_relevant(each, Caneft(task_ratio=ratio, task_merge=merge)).nonzero().flatten().tolist())
    keep = math.floor(ratio * 60 + 0.5)
    rows = each.tolist()
    if merge == "mean":
        rows = [[sum(column) / 3 for column in zip(*rows, strict=True)]]
    tops = [set(sorted(range(60), key=lambda n: (-row[n], n))[:keep]) for row in rows]
    assert found == (set.union(*tops) if merge == "union" else set.intersection(*tops))
    assert len(found) > 0 or merge == "intersection"


@pytest.mark.parametrize("reading", [*READINGS, None])
@pytest.mark.parametrize("task", [None, "mean", "union", "intersection"])
def test_selection_takes_the_best_of_the_candidates_and_no_others(reading, task):
    shape = shape_of(2, 40)
    scores, groups = lognormal(150, shape)
    stats = statistics_of(scores, groups, shape)
    method = Caneft(task_ratio=0.5 if task else None, task_merge=task or "mean", consensus=reading, neuron_ratio=0.05)
    chosen = select(stats, method)
    each = selection.importance(stats)
    expected_each = torch.stack([scores[groups == g].double().mean(0) for g in range(3)])
    torch.testing.assert_close(each, expected_each, rtol=1e-12, atol=0)
    value = (selection.mutual_information(stats, method) if reading else each.mean(0)).tolist()
    candidates = task_relevant(each, method)
    order = sorted(candidates.nonzero().flatten().tolist(), key=lambda n: (-value[n], n))
    assert chosen.neurons.count == 10
    assert chosen.neurons.flat().tolist() == sorted(order[:10])
    assert chosen.gamma == value[order[9]]
    assert chosen.candidates == candidates.sum()
    assert (chosen.mi is None) == (reading is None)
    assert chosen.importance.shape == (200,)
    assert chosen.samples == {"it": 75, "law": 38, "medical": 37}
    assert chosen.neurons.provenance["options"]["consensus"] == reading
    assert chosen.neurons.provenance["method"] == "caneft"


def test_ties_break_by_flat_order_and_are_said():
    """Eight neurons with the same scores, shuffled among weaker ones, and room for five."""
    shape = shape_of(2, 20)
    scores, groups = lognormal(120, shape)
    scores = 1e-6 * (1 + torch.rand(scores.shape, generator=torch.Generator().manual_seed(4)))
    best = torch.tensor([88, 3, 41, 17, 60, 99, 5, 72])
    scores[:, best] = (1e-6 * (1 + groups.float()))[:, None]
    chosen = select(statistics_of(scores, groups, shape), Caneft(task_ratio=None, neuron_ratio=0.05))
    assert chosen.neurons.flat().tolist() == sorted(best.tolist())[:5]
    assert (chosen.ties, chosen.ties_left_out) == (8, 3)
    assert any("3 neurons tie" in line for line in chosen.warnings)


def test_a_tie_is_a_tie_whatever_the_order_of_bins():
    """Domains permuted over bins give the same information up to rounding: it must not decide."""
    counts = torch.randint(1, 50, (3, 1, 10), generator=torch.Generator().manual_seed(6))
    permuted = torch.cat([counts[..., torch.randperm(10)] for _ in range(1)] + [counts.flip(-1), counts], 1)
    for reading in READINGS:
        assert len(consensus(permuted, Caneft(consensus=reading)).unique()) == 1


@pytest.mark.parametrize(
    ("ratio", "total", "expected"),
    [
        (0.01, 150, 2),
        (0.01, 149, 1),
        (0.145, 100, 15),
        (0.35, 10, 4),
        (0.0125, 1_048_576, 13107),
        (1.0, 7, 7),
        (0.1, 4, 0),
    ],
)
def test_counts_round_half_up_of_the_ratio_as_written(ratio, total, expected):
    assert share_of(ratio, total) == expected


def test_order_of_samples_does_not_change_the_selection():
    shape = shape_of(2, 40)
    scores, groups = lognormal(150, shape)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(7))
    first = select(statistics_of(scores, groups, shape), Caneft(neuron_ratio=0.05))
    second = select(statistics_of(scores[order], groups[order], shape), Caneft(neuron_ratio=0.05))
    assert first.neurons == second.neurons
    assert torch.equal(first.mi, second.mi)


def test_empty_layers_are_fine_and_chunks_do_not_matter(monkeypatch):
    shape = shape_of(4, 40)
    scores, groups = lognormal(90, shape)
    scores[:, 100:200] *= 1e-3  # layer 1 falls out of the task filter
    stats = statistics_of(scores, groups, shape)
    whole = select(stats, Caneft(neuron_ratio=0.02)).neurons
    monkeypatch.setattr(selection, "CHUNK", 7)
    assert select(stats, Caneft(neuron_ratio=0.02)).neurons == whole
    assert 1 not in {layer for layer, _, _ in whole.slices}


def refused(stats: Statistics, method: Caneft) -> str:
    with pytest.raises(UserError) as error:
        select(stats, method)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_ratios_that_leave_no_choice_are_refused():
    shape = shape_of(1, 40)
    stats = statistics_of(*lognormal(60, shape), shape)
    assert "--method.neuron-ratio 0.004 of 100 is no neuron: raise it" in refused(stats, Caneft(neuron_ratio=0.004))
    assert "is all neurons: lower it" in refused(stats, Caneft(neuron_ratio=1.0, **OPEN))
    few = refused(stats, Caneft(neuron_ratio=0.3, task_ratio=0.2))
    assert "20 neurons of the 30 wanted" in few
    assert "--method.task-ratio 0.2" in few


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_name_layer_and_projection(bad):
    shape = shape_of(3, 8)
    scores, groups = lognormal(60, shape)
    scores[17, 2 * 20 + 8 + 3] = bad
    assert "layer 2 up" in refused(statistics_of(scores, groups, shape), Caneft(neuron_ratio=0.1))


def test_constant_scores_are_refused():
    shape = shape_of(1, 40)
    scores, groups = lognormal(60, shape)
    same = refused(statistics_of(torch.full_like(scores, 1e-5), groups, shape), Caneft())
    assert "same importance" in same
    apart = (torch.arange(100) + 1) * 1e-7  # each neuron has its own constant
    assert "mutual information is 0" in refused(statistics_of(apart.expand(60, -1), groups, shape), Caneft())
    below = refused(statistics_of(scores * 1e-20, groups, shape), Caneft())
    assert "100.0% are out of range" in below
    assert "--score.lowest-octave" in below
    neurons = select(statistics_of(apart.expand(60, -1), groups, shape), Caneft(consensus=None, **OPEN)).neurons
    assert neurons.flat().tolist() == [99]


def test_groups_that_cannot_inform_are_refused():
    shape = shape_of(1, 40)
    scores, groups = lognormal(60, shape)
    alone = statistics_of(scores, torch.zeros_like(groups), shape, ["it"])
    assert "it alone" in refused(alone, Caneft())
    assert select(alone, Caneft(consensus=None)).neurons.count == 1
    four = statistics_of(scores, groups, shape, ["it", "law", "medical", "subtitles"])
    assert "no sentence of subtitles" in refused(four, Caneft())


def test_incomplete_statistics_are_refused():
    shape = shape_of(2, 8)
    stats = statistics_of(*lognormal(60, shape), shape)
    stats.histogram["up"][1, 1, 3, :] = 0
    assert "layer 1 up: not every sentence was counted" in refused(stats, Caneft(neuron_ratio=0.1))


def test_warnings_say_what_the_user_should_know():
    shape = shape_of(1, 40)
    scores, groups = lognormal(60, shape)
    plain = select(statistics_of(scores[groups.argsort()][-45:], torch.arange(45) % 3, shape), Caneft())
    assert plain.warnings == []
    low, high = scores.clone(), scores.clone()
    low[:, :10] = 2.0**-45
    high[:, :10] = 2.0**-3
    for changed, remedy in ((low, "--score.lowest-octave -48"), (high, "--score.lowest-octave -32")):
        chosen = select(statistics_of(changed, groups, shape), Caneft())
        assert chosen.clamped_share == pytest.approx(0.1, abs=1e-3)
        assert any(remedy in line for line in chosen.warnings)
        assert any("it 30, law 15, medical 15" in line for line in chosen.warnings)


def test_streamed_deciles_agree_with_exact_ones():
    shape = shape_of(2, 800)
    scores, groups = lognormal(2000, shape)
    found = selection.agreement(scores, groups, statistics_of(scores, groups, shape), Caneft(neuron_ratio=0.01))
    assert found["neurons"] == 4000
    assert found["selected"] == 40
    assert 0 < found["mean_abs_delta"] <= 0.002
    assert found["overlap"] >= 0.95


def test_command_line_selects_and_writes(tmp_path, capsys):
    shape = shape_of(2, 40)
    stats = statistics_of(*lognormal(150, shape), shape)
    stats.save(tmp_path / "statistics.safetensors", {"model": "ab12"})
    out = tmp_path / "neurons.safetensors"
    main([str(tmp_path / "statistics.safetensors"), "--out", str(out), "--method.consensus", "joint"])
    neurons = NeuronSet.load(out)
    assert neurons == select(stats, Caneft(consensus="joint")).neurons
    assert neurons.provenance["statistics"] == {"model": "ab12"}
    assert "2 of 200 neurons" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "none.safetensors")])
    assert "error: " in (said := capsys.readouterr().err)
    assert "no such file" in said


def test_selection_is_written_for_the_report(tmp_path):
    shape = shape_of(2, 40)
    chosen = select(statistics_of(*lognormal(150, shape), shape), Caneft())
    chosen.save(tmp_path / "selection.safetensors")
    with safe_open(tmp_path / "selection.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("mi"), chosen.mi)
        assert torch.equal(file.get_tensor("importance"), chosen.importance)
        assert json.loads(file.metadata()["selection"])["gamma"] == chosen.gamma
