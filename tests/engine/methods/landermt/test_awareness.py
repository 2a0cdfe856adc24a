"""Layers, owners, shares and gains against a second computation: plain loops over Python floats and fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from slicetune.engine.common.errors import UserError
from slicetune.engine.methods.landermt.awareness import general_share, layer_relevance, relevant
from slicetune.engine.methods.landermt.detection import Detection
from slicetune.engine.methods.landermt.routes import GENERAL, NOBODY
from slicetune.engine.methods.landermt.settings import Landermt

PAIRS = ("de-en", "en-de", "fr-en", "en-fr", "it-fr")
LANGUAGES = ("de", "en", "fr", "it")
LAYERS, UNITS, HIDDEN = 6, 37, 5


def detection(seed: int = 0, dead: int = 4) -> Detection:
    """Random sums; the first `dead` units of every layer are never aware, so that ties exist."""
    generator = torch.Generator().manual_seed(seed)
    found = Detection(PAIRS, LAYERS, UNITS, HIDDEN)
    for name in ("hidden_sum", "output_sum", "awareness_sum"):
        getattr(found, name).copy_(torch.rand(getattr(found, name).shape, generator=generator, dtype=torch.float64))
    found.awareness_sum[..., :dead] = 0
    found.prompts += torch.tensor([7, 3, 5, 2, 9])
    found.sentences += torch.tensor([11, 4, 6, 8])
    return found


def brute_relevance(found: Detection, vector: bool) -> list[list[float]]:
    rows = []
    for pair in range(len(PAIRS)):
        row = []
        for layer in range(LAYERS - 1):
            if vector:
                one, two = found.output_sum[pair, layer].tolist(), found.output_sum[pair, layer + 1].tolist()
                row.append(math.dist(one, two) / int(found.prompts[pair]))
            else:
                one, two = (math.fsum(found.hidden_sum[pair, i].tolist()) for i in (layer, layer + 1))
                row.append(abs(one - two) / UNITS / int(found.prompts[pair]))
        rows.append(row)
    return rows


def top(values: list[float], k: int) -> set[int]:
    """The k layers of largest D; the last layer, which has none, comes last."""
    return set(sorted(range(LAYERS), key=lambda i: (-(values[i] if i < LAYERS - 1 else -1.0), i))[:k])


def brute_layers(found: Detection, method: Landermt) -> list[set[int]]:
    rows = brute_relevance(found, method.activation == "vector")
    if method.layers == "per_pair":
        return [top(row, method.k) for row in rows]
    return [top([math.fsum(column) / len(rows) for column in zip(*rows, strict=True)], method.k)] * len(rows)


def brute_phi(found: Detection, layer: int) -> list[list[Fraction]]:
    """Φ of every unit and language, exactly."""
    sums, counts = found.awareness_sum[:, layer].T.tolist(), found.sentences.tolist()
    return [[Fraction(value) / count for value, count in zip(unit, counts, strict=True)] for unit in sums]


def brute_owners(phi: list[list[Fraction]], method: Landermt) -> list[int]:
    p = len(phi)
    silent = sorted(range(p), key=lambda i: (max(phi[i]), i))[: math.floor(Fraction(str(method.awareness_floor)) * p)]
    rest = [i for i in range(p) if i not in silent]
    taken = math.floor(Fraction(str(method.epsilon)) * len(rest))

    def variance(i: int) -> Fraction:
        mean = sum(phi[i]) / len(phi[i])
        return sum((value - mean) ** 2 for value in phi[i])

    ranked = sorted(rest, key=lambda i: (variance(i), i))
    general = ranked[:taken] if method.general_split == "lowest_variance" else ranked[: len(rest) - taken]
    owner = [phi[i].index(max(phi[i])) for i in range(p)]
    for i in general:
        owner[i] = GENERAL
    for i in silent:
        owner[i] = NOBODY
    return owner


def brute_share(phi: list[list[Fraction]], owner: list[int], pair: str) -> Fraction:
    own = [LANGUAGES.index(name) for name in pair.split("-")]
    mean = [(unit[own[0]] + unit[own[1]]) / 2 for unit in phi]
    general = sum(value for value, o in zip(mean, owner, strict=True) if o == GENERAL)
    specific = sum(value for value, o in zip(mean, owner, strict=True) if o in own)
    return general / (general + specific)


READINGS = [
    Landermt(),
    Landermt(k=2, layers="per_pair"),
    Landermt(k=3, activation="vector", epsilon=0.5),
    Landermt(k=1, general_split="literal"),
    Landermt(k=2, awareness_floor=0.3, epsilon=0.29),
    Landermt(k=2, car="literal", epsilon=0.4),
    Landermt(k=6, car="none", epsilon=0.0),
    Landermt(k=2, car="learned", layers="per_pair", activation="vector", epsilon=0.7),
]


@pytest.mark.parametrize("method", READINGS, ids=lambda m: f"k{m.k}-{m.layers}-{m.activation}-{m.epsilon}-{m.car}")
@pytest.mark.parametrize("seed", [0, 1])
def test_routes_equal_loops_over_fractions(method, seed):
    found = detection(seed)
    made, layers = method.routes_of(found), brute_layers(found, method)
    assert set(made.layers) == set().union(*layers)
    for position, layer in enumerate(made.layers):
        phi = brute_phi(found, layer)
        owner = brute_owners(phi, method)
        assert made.owner[position].tolist() == owner
        gain = made.gains(position)
        for row, pair in enumerate(PAIRS):
            assert made.takes[row, position] == (layer in layers[row])
            car = brute_share(phi, owner, pair)
            share = 1 - car if method.car == "literal" else car
            assert made.share[row, position].item() == pytest.approx(float(share), rel=1e-7)
            if layer in layers[row]:
                factor = {GENERAL: share, **{LANGUAGES.index(name): 1 - share for name in pair.split("-")}}
                factor = dict.fromkeys(factor, 1) if method.car == "none" else factor
                wanted = [float(factor.get(o, 0)) for o in owner]
                assert gain[row].tolist() == pytest.approx(wanted, abs=1e-7)


@pytest.mark.parametrize("activation", ["scalar", "vector"])
def test_relevance_equals_loops(activation):
    found = detection(3)
    got = found.relevance(activation)
    assert got.dtype == torch.float64
    torch.testing.assert_close(
        got, torch.tensor(brute_relevance(found, activation == "vector"), dtype=torch.float64), rtol=1e-13, atol=1e-16
    )
    assert torch.equal(layer_relevance(found.hidden, found.output, activation), got)


def test_ties_go_to_the_first_layer_unit_and_language():
    relevance = torch.tensor([[1.0, 2.0, 2.0, 0.0]], dtype=torch.float64)
    assert relevant(relevance, 1, own=True).tolist() == [[False, True, False, False, False]]
    assert relevant(relevance, 4, own=True).tolist() == [[True, True, True, True, False]]
    assert bool(relevant(relevance, 5, own=False).all())
    phi = torch.tensor([[1.0, 3.0, 0.0, 3.0], [2.0, 2.0, 0.0, 2.0], [2.0, 3.0, 0.0, 3.0]], dtype=torch.float64)
    assert Landermt(epsilon=0.5).owners(phi).tolist() == [GENERAL, 0, GENERAL, 0]  # variance 2/9 each but the third's
    assert Landermt(epsilon=0.0).owners(phi).tolist() == [1, 0, 0, 0]


def test_no_awareness_at_all_is_all_general():
    own = torch.tensor([[True, True]])
    assert general_share(torch.zeros(2, 3, dtype=torch.float64), torch.full((3,), GENERAL), own).tolist() == [1.0]


def test_more_layers_than_there_are():
    with pytest.raises(UserError, match=r"--method\.k 7: the model has 6 layers"):
        Landermt(k=7).routes_of(detection())
