"""Methods that select neurons: LAPE against its formula written out, RCN's counts, a user's own sets."""

from __future__ import annotations

import json
import math

import pytest
import torch
import toys

from slicetune.engine.common.errors import UserError
from slicetune.engine.methods.caneft.settings import Caneft, Rcn
from slicetune.engine.methods.given import Given
from slicetune.engine.methods.lape import Lape
from slicetune.engine.models.shapes import from_config
from slicetune.engine.scoring.config import ScoreConfig
from slicetune.engine.scoring.passes import score
from slicetune.engine.scoring.statistics import Statistics
from slicetune.engine.slices.ffn import attach
from slicetune.engine.slices.neurons import NeuronSet

SENTENCES = 40


@pytest.fixture(scope="module")
def shape():
    return from_config(toys.model().config)


@pytest.fixture(scope="module")
def stats(shape):
    """Two domains that use different halves of the vocabulary."""
    made = Statistics(["a", "b"], shape)
    score(toys.model(), sentences(), made, ScoreConfig(tokens_per_batch=64))
    return made


def sentences():
    examples = toys.examples(SENTENCES)
    for example in examples:
        example.input_ids = [token // 2 + 32 * example.group for token in example.input_ids]
    return examples


def lape_by_hand(ratio: float, percentile: float) -> tuple[set[tuple[int, int]], list[list[float]]]:
    """The published formula, one sentence at a time: {(layer, unit)} and p[unit][group]; nothing of the engine's."""
    model, on = toys.model(), {}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.act_fn.register_forward_hook(lambda m, args, out, n=number: on.__setitem__(n, out[0] > 0))
    units = toys.LAYERS * toys.INTERMEDIATE
    active, tokens = [[0, 0] for _ in range(units)], [0, 0]
    for example in sentences():
        with torch.no_grad():
            model(torch.tensor([example.input_ids]))
        tokens[example.group] += len(example.input_ids)
        for layer in range(toys.LAYERS):
            for unit, count in enumerate(on[layer].sum(0).tolist()):
                active[layer * toys.INTERMEDIATE + unit][example.group] += count
    p = [[count / total for count, total in zip(counts, tokens, strict=True)] for counts in active]
    every = sorted(value for values in p for value in values)
    bar = every[round(len(every) * percentile) - 1]
    entropies = {}
    for unit, values in enumerate(p):
        shares = [value / sum(values) for value in values] if sum(values) else [0.0] * len(values)
        if max(values) > bar:
            entropies[unit] = -sum(share * math.log(share) for share in shares if share)
    wanted = math.floor(ratio * units + 0.5)
    best = sorted(entropies, key=lambda unit: (entropies[unit], unit))[:wanted]
    assert len(best) == wanted
    return {divmod(unit, toys.INTERMEDIATE) for unit in best}, p


@pytest.mark.parametrize(("ratio", "percentile"), [(0.02, 0.95), (0.05, 0.8), (0.2, 0.5)])
def test_lape_equals_its_formula(ratio, percentile, stats, shape):
    expected, p = lape_by_hand(ratio, percentile)
    counted = stats.active.double() / stats.tokens[:, None, None]
    assert torch.equal(counted.flatten(1).T, torch.tensor(p, dtype=torch.float64))
    neurons, _ = Lape(neuron_ratio=ratio, percentile=percentile).select(stats, shape, 0)
    for projection, axis in (("gate", "row"), ("up", "row"), ("down", "column")):
        found = {
            (key[0], i)
            for key, index in neurons.slices.items()
            if key[1:] == (projection, axis)
            for i in index.tolist()
        }
        assert found == expected
    assert neurons.parameters() == len(expected) * 3 * toys.HIDDEN == Lape(neuron_ratio=ratio).bounds(shape).exact
    assert neurons.provenance["units"] == len(expected)


def test_lape_trains_gate_and_up_rows_and_down_columns(stats, shape, tmp_path):
    neurons, _ = Lape(neuron_ratio=0.05).select(stats, shape, 0)
    neurons.save(tmp_path / "neurons.safetensors")
    assert NeuronSet.load(tmp_path / "neurons.safetensors") == neurons
    model = toys.model()
    attach(model, neurons)
    kinds = {(name.rpartition(".mlp.")[2], axis) for name, axis, _, _ in toys.named_slices(model)}
    assert kinds == {("gate_proj.weight", "row"), ("up_proj.weight", "row"), ("down_proj.weight", "column")}


def test_lape_matches_the_parameters_of_another_set(stats, shape, tmp_path):
    like, _ = Caneft(neuron_ratio=0.1).select(stats, shape, 0)
    like.save(tmp_path / "caneft.safetensors")
    lape = Lape(match=str(tmp_path / "caneft.safetensors"), percentile=0.5)
    neurons, _ = lape.select(stats, shape, 0)
    unit = 3 * toys.HIDDEN
    assert abs(neurons.parameters() - like.parameters()) <= unit / 2
    assert neurons.parameters() == lape.bounds(shape).exact


def test_lape_refuses_what_it_cannot_count(stats, shape):
    with pytest.raises(UserError, match="are active often"):
        Lape(neuron_ratio=0.9).select(stats, shape, 0)
    alone = Statistics(["a"], shape)
    with pytest.raises(UserError, match="needs two or more"):
        Lape().select(alone, shape, 0)
    alone.provenance = {"score": {"tokens": "target"}}
    with pytest.raises(UserError, match="counts all tokens"):
        Lape().select(alone, shape, 0)


def test_rcn_has_canefts_counts(stats, shape):
    caneft, _ = Caneft(neuron_ratio=0.1).select(stats, shape, 0)
    sets = [Rcn(neuron_ratio=0.1).select(stats, shape, seed)[0] for seed in (0, 0, 1)]
    assert all(each.counts() == caneft.counts() and each.parameters() == caneft.parameters() for each in sets)
    assert sets[0] == sets[1]
    assert sets[0] != sets[2]
    assert sets[0] != caneft


def test_ablations_differ_from_caneft(stats, shape):
    made = [
        Caneft(neuron_ratio=0.05, **options).select(stats, shape, 0)[0]
        for options in ({}, {"task_ratio": None}, {"consensus": None})
    ]
    assert len({each.fingerprint for each in made}) == 3
    assert len({each.count for each in made}) == 1


def test_given_is_the_union_of_its_files(shape, tmp_path):
    first = toys.neurons()
    first.save(tmp_path / "first.safetensors")
    (tmp_path / "mine.json").write_text(json.dumps([[0, "gate", 1], [0, "down", 7], [1, "up", 0]]))
    given = Given(files=(str(tmp_path / "first.safetensors"), str(tmp_path / "mine.json")))
    neurons, _ = given.select(None, shape, 0)
    assert neurons.count == first.count + 2  # gate 1 is in both
    assert neurons.slices[0, "gate", "row"].tolist() == [1, 5, 47]
    assert given.bounds(shape).exact == neurons.parameters()
    with pytest.raises(UserError, match="is empty: name a neurons"):
        Given().select(None, shape, 0)
    widths = {"gate": 4, "up": 4, "down": 2}
    NeuronSet({}, 1, widths, widths).save(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="another shape"):
        Given(files=(str(tmp_path / "other.safetensors"),)).select(None, shape, 0)
