"""LANDeRMT's settings: counts of units and weights by hand, bad values refused."""

import pytest
from transformers import BloomConfig

from slicetune.engine.common.errors import UserError
from slicetune.engine.methods.landermt.settings import Landermt, Split
from slicetune.engine.models.shapes import from_config

BLOOM_7B1 = from_config(BloomConfig(hidden_size=4096, n_layer=30, n_head=32, vocab_size=250_880), "BLOOM-7b1")


def test_trained_weights_of_bloom_7b1():
    """The paper's 805 M are four whole blocks; the FFN's slices alone are two matrices and the inner bias a layer."""
    assert Landermt(attention=True).bounds(BLOOM_7B1).exact == 805_519_360
    assert Landermt().bounds(BLOOM_7B1).exact == 4 * (2 * 4096 * 16384 + 16384) == 536_936_448
    assert Landermt().bounds(BLOOM_7B1).neurons == 4 * 16384
    own = Landermt(layers="per_pair").bounds(BLOOM_7B1)
    assert (own.minimum, own.maximum, own.exact) == (536_936_448, 30 * 134_234_112, None)
    assert Landermt(k=30, layers="per_pair").bounds(BLOOM_7B1).exact == 30 * 134_234_112


def test_units_of_a_layer():
    assert Landermt().split(16384) == Split(14745, 1639, 0)
    assert Landermt(general_split="literal").split(16384) == Split(1639, 14745, 0)
    assert Landermt(epsilon=0.29).split(100) == Split(29, 71, 0)  # 0.29 · 100 is 28.999… in floating point
    assert Landermt(awareness_floor=0.25, epsilon=0.5).split(10) == Split(4, 4, 2)
    assert Landermt(epsilon=1.0).split(7) == Split(7, 0, 0)


def test_one_kind_of_units():
    class General(Landermt):
        trains_units = "general"

    class Specific(Landermt):
        trains_units = "specific"

    row = 2 * 4096 + 1
    assert General().bounds(BLOOM_7B1).exact == 4 * 14745 * row
    assert Specific().bounds(BLOOM_7B1).exact == Specific(attention=True).bounds(BLOOM_7B1).exact == 4 * 1639 * row


@pytest.mark.parametrize(
    ("wrong", "flag"),
    [({"k": 0}, "method.k 0"), ({"epsilon": 1.1}, "method.epsilon 1.1"), ({"awareness_floor": 1.0}, "awareness-floor")],
)
def test_bad_settings_are_refused(wrong, flag):
    with pytest.raises(UserError, match=flag):
        Landermt(**wrong)


def test_more_layers_than_the_model_has():
    with pytest.raises(UserError, match=r"--method\.k 31: the model has 30 layers"):
        Landermt(k=31).bounds(BLOOM_7B1)
