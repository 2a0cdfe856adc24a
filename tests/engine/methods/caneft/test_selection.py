"""Selection: the task filter against sets, ties, rounding, refusals. References are written from the definitions."""

import math

import pytest
import torch
from drawn import lognormal, shape_of, statistics_of

from slicetune.engine.commands import main
from slicetune.engine.common.errors import UserError
from slicetune.engine.methods.caneft import information, selection
from slicetune.engine.methods.caneft.selection import select, task_relevant
from slicetune.engine.methods.caneft.settings import Caneft
from slicetune.engine.methods.counts import share_of
from slicetune.engine.scoring.statistics import Statistics
from slicetune.engine.slices.neurons import NeuronSet

OPEN = {"task_ratio": None}
READINGS = ("specific", "one_vs_rest", "joint")


@pytest.mark.parametrize("merge", ["mean", "intersection", "union"])
@pytest.mark.parametrize("ratio", [0.05, 0.3, 1.0])
def test_task_filter_is_that_of_sets(merge, ratio):
    each = torch.randint(0, 40, (3, 60), generator=torch.Generator().manual_seed(3)).double()  # many ties
    found = set(task_relevant(each, ratio, merge).nonzero().flatten().tolist())
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
    chosen = select(stats, **vars(method))
    each = selection.importance(stats)
    expected_each = torch.stack([scores[groups == g].double().mean(0) for g in range(3)])
    torch.testing.assert_close(each, expected_each, rtol=1e-12, atol=0)
    value = (information.mutual_information(stats, reading=reading) if reading else each.mean(0)).tolist()
    candidates = task_relevant(each, method.task_ratio, method.task_merge)
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
    chosen = select(statistics_of(scores, groups, shape), **vars(Caneft(task_ratio=None, neuron_ratio=0.05)))
    assert chosen.neurons.flat().tolist() == sorted(best.tolist())[:5]
    assert (chosen.ties, chosen.ties_left_out) == (8, 3)
    assert any("3 neurons tie" in line for line in chosen.warnings)


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
    first = select(statistics_of(scores, groups, shape), **vars(Caneft(neuron_ratio=0.05)))
    second = select(statistics_of(scores[order], groups[order], shape), **vars(Caneft(neuron_ratio=0.05)))
    assert first.neurons == second.neurons
    assert torch.equal(first.mi, second.mi)


def test_empty_layers_are_fine_and_chunks_do_not_matter(monkeypatch):
    shape = shape_of(4, 40)
    scores, groups = lognormal(90, shape)
    scores[:, 100:200] *= 1e-3  # layer 1 falls out of the task filter
    stats = statistics_of(scores, groups, shape)
    whole = select(stats, **vars(Caneft(neuron_ratio=0.02))).neurons
    monkeypatch.setattr(information, "CHUNK", 7)
    assert select(stats, **vars(Caneft(neuron_ratio=0.02))).neurons == whole
    assert 1 not in {layer for layer, _, _ in whole.slices}


def refused(stats: Statistics, method: Caneft) -> str:
    with pytest.raises(UserError) as error:
        select(stats, **vars(method))
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
    neurons = select(statistics_of(apart.expand(60, -1), groups, shape), **vars(Caneft(consensus=None, **OPEN))).neurons
    assert neurons.flat().tolist() == [99]


def test_groups_that_cannot_inform_are_refused():
    shape = shape_of(1, 40)
    scores, groups = lognormal(60, shape)
    alone = statistics_of(scores, torch.zeros_like(groups), shape, ["it"])
    assert "only one group was scored, 'it'" in refused(alone, Caneft())
    assert select(alone, consensus=None).neurons.count == 1
    four = statistics_of(scores, groups, shape, ["it", "law", "medical", "subtitles"])
    assert "no sentence of 'subtitles'" in refused(four, Caneft())


def test_incomplete_statistics_are_refused():
    shape = shape_of(2, 8)
    stats = statistics_of(*lognormal(60, shape), shape)
    stats.histogram["up"][1, 1, 3, :] = 0
    assert "layer 1 up: not every sentence was counted" in refused(stats, Caneft(neuron_ratio=0.1))


def test_warnings_say_what_the_user_should_know():
    shape = shape_of(1, 40)
    scores, groups = lognormal(60, shape)
    plain = select(statistics_of(scores[groups.argsort()][-45:], torch.arange(45) % 3, shape), **vars(Caneft()))
    assert plain.warnings == []
    low, high = scores.clone(), scores.clone()
    low[:, :10] = 2.0**-45
    high[:, :10] = 2.0**-3
    for changed, words in ((low, "lie below the histogram's range (2^-40 to 2^-8)"), (high, "its highest bin")):
        chosen = select(statistics_of(changed, groups, shape), **vars(Caneft()))
        assert chosen.clamped_share == pytest.approx(0.1, abs=1e-3)
        assert any(words in line for line in chosen.warnings)
        assert any("'it' 30, 'law' 15, 'medical' 15" in line for line in chosen.warnings)


def test_command_line_selects_and_writes(tmp_path, capsys):
    shape = shape_of(2, 40)
    stats = statistics_of(*lognormal(150, shape), shape)
    stats.save(tmp_path / "statistics.safetensors", {"model": "ab12"})
    out = tmp_path / "neurons.safetensors"
    main(["select", str(tmp_path / "statistics.safetensors"), "--out", str(out), "--method.consensus", "joint"])
    neurons = NeuronSet.load(out)
    assert neurons == select(stats, **vars(Caneft(consensus="joint"))).neurons
    assert neurons.provenance["statistics"] == {"model": "ab12"}
    assert "2 of 200 neurons" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["select", str(tmp_path / "none.safetensors")])
    assert "error: " in (said := capsys.readouterr().err)
    assert "no such file" in said
