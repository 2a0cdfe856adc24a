"""NeuronSet: order, counts, files that come back exactly, and broken ones that are refused in one line."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from slicetune.engine.common.errors import UserError
from slicetune.engine.slices.neurons import NeuronSet, thirds

SHAPE = SimpleNamespace(
    layers=5, widths={"gate": 6, "up": 6, "down": 4}, fan_in={"gate": 4, "up": 4, "down": 6}, intermediate=6
)


def make(slices: dict, **changes) -> NeuronSet:
    tensors = {key: torch.tensor(index, dtype=torch.int64) for key, index in slices.items()}
    return NeuronSet(tensors, **({"layers": 5, "widths": SHAPE.widths, "fan_in": SHAPE.fan_in} | changes))


def channels() -> NeuronSet:
    return make({(2, "down", "row"): [3], (0, "gate", "row"): [0, 5], (2, "up", "row"): [1], (1, "up", "row"): []})


def units() -> NeuronSet:
    own = {(3, "gate", "row"): [1, 4], (3, "up", "row"): [1, 4], (3, "down", "column"): [1, 4]}
    return make(own)


def test_flat_order_is_layer_then_projection_then_index():
    everything = [
        (layer, projection, index)
        for layer in range(SHAPE.layers)
        for projection, width in SHAPE.widths.items()
        for index in range(width)
    ]
    flat = torch.tensor([79, 0, 17, 6, 41, 40, 31])
    neurons = NeuronSet.from_flat(flat, SHAPE)
    expected = [everything[number] for number in sorted(flat.tolist())]
    found = [(layer, p, int(i)) for (layer, p, axis), index in neurons.slices.items() for i in index if axis == "row"]
    assert found == expected
    assert torch.equal(neurons.flat(), flat.sort().values)


def test_counts_and_trainable_parameters():
    assert channels().count == 4
    assert channels().counts() == {("gate", "row"): 2, ("up", "row"): 1, ("down", "row"): 1}
    assert channels().parameters() == 2 * 4 + 1 * 4 + 1 * 6
    assert channels().parameters(bias=True) == 2 * 5 + 1 * 5 + 1 * 7
    assert units().parameters() == 2 * 4 + 2 * 4 + 2 * 4  # a column of down [4, 6] has 4 weights
    assert units().parameters(bias=True) == 2 * 5 + 2 * 5 + 2 * 4  # and no bias
    assert (2, "up", "row") in channels().slices
    assert (1, "up", "row") not in channels().slices


@pytest.mark.parametrize("neurons", [channels(), units(), make({})], ids=["channels", "units", "empty"])
def test_file_comes_back_exactly(tmp_path, neurons):
    neurons.provenance = {"method": "caneft", "sentences": {"it": 2000}, "statistics": {"model": "ab12"}}
    neurons.save(tmp_path / "neurons.safetensors")
    back = NeuronSet.load(tmp_path / "neurons.safetensors")
    assert back == neurons
    assert back.fingerprint == neurons.fingerprint
    assert list(back.slices) == list(neurons.slices)
    for key, index in neurons.slices.items():
        assert torch.equal(back.slices[key], index)
    assert back.provenance == neurons.provenance
    assert [path.name for path in tmp_path.iterdir()] == ["neurons.safetensors"]


def test_equality_sees_index_axis_layer_and_shape_but_not_provenance():
    one = make({(0, "down", "row"): [1]})
    assert one == make({(0, "down", "row"): [1]}, provenance={"method": "other"})
    others = [{(0, "down", "row"): [2]}, {(0, "down", "column"): [1]}, {(1, "down", "row"): [1]}, {}]
    others += [{(0, "down", "row"): [1, 2]}, {(0, "gate", "row"): [1]}]
    assert all(one != make(other) for other in others)
    assert one != make({(0, "down", "row"): [1]}, layers=6)


def test_random_has_as_many_of_each_projection_and_is_seeded():
    shape = SimpleNamespace(layers=8, widths={"gate": 600, "up": 600, "down": 400}, fan_in=SHAPE.fan_in)
    like = NeuronSet.from_flat(torch.arange(0, 2000, 2), shape)
    first, again, other = (NeuronSet.random(shape, like, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first.counts() == like.counts()
    assert first.parameters() == like.parameters()
    assert first.provenance == {"method": "random", "seed": 1, "like": like.fingerprint}
    per_layer = torch.tensor([sum(len(i) for key, i in first.slices.items() if key[0] == layer) for layer in range(8)])
    assert per_layer.min() > 80  # uniform over the depth: 125 expected, though `like` lies in two layers
    full = NeuronSet.from_flat(torch.arange(8 * 1600), shape)
    assert NeuronSet.random(shape, full, 3) == full


def test_union():
    one, other = make({(0, "gate", "row"): [0, 5]}), make({(0, "gate", "row"): [2, 5], (3, "down", "column"): [1]})
    assert one.union(other) == make({(0, "gate", "row"): [0, 2, 5], (3, "down", "column"): [1]})
    assert one.union(other) == other.union(one)
    with pytest.raises(UserError, match="different models"):
        one.union(make({}, layers=6))


def test_json_of_the_users_own(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([[2, "down", 3], [0, "gate", 5], [2, "up", 1], [0, "gate", 0]]))
    neurons = NeuronSet.from_json(path, SHAPE)
    assert neurons == channels()
    assert neurons.provenance == {"method": "given", "file": str(path)}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[0, 'gate', 1]]", "JSON"),
        ("{}", "write a list"),
        ("[]", "write a list"),
        ('[[0, "gate"]]', "entry 0"),
        ('[[0, "gate", 1], [0, "gate", 1.0]]', "entry 1"),
        ('[[true, "gate", 1]]', "entry 0"),
        ("[[0, [], 1]]", "entry 0"),
        ('[[0, "gate", 1], [0, "gate", 1]]', "twice"),
        ('[[0, "gate", 6]]', "index 6 is outside 0 to 5"),
        ('[[0, "gate", -1]]', "index -1 is outside 0 to 5"),
        ('[[5, "gate", 1]]', "layers 0 to 4"),
        ('[[0, "down_proj", 1]]', "gate up down"),
        ('[[0, "gate", 1e30]]', "entry 0"),
        ('[[0, "gate", 1000000000000000000000000]]', "entry 0"),
        ("[" * 100_000, "JSON"),
    ],
)
def test_bad_json_is_refused_in_one_line_that_names_file_and_entry(tmp_path, text, says):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(UserError, match=says) as error:
        NeuronSet.from_json(path, SHAPE)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def metadata(**changes) -> dict:
    shape = json.dumps({"layers": 5, "widths": SHAPE.widths, "fan_in": SHAPE.fan_in})
    return {"format": "slicetune.neurons", "shape": shape, "provenance": "{}"} | changes


@pytest.mark.parametrize(
    ("tensors", "about", "says"),
    [
        ({"0.gate.row": [1, 6]}, {}, "index 6 is outside 0 to 5"),
        ({"0.down.column": [6]}, {}, "index 6 is outside 0 to 5"),
        ({"0.gate.row": [2, 1]}, {}, "not sorted"),
        ({"0.gate.row": [1, 1]}, {}, "twice"),
        ({"0.knob.row": [1]}, {}, "unknown projection"),
        ({"7.gate.row": [1]}, {}, "layers 0 to 4"),
        ({"0.gate.diagonal": [1]}, {}, "diagonal"),
        ({"00.gate.row": [1]}, {}, "plain number"),
        ({"gate": [1]}, {}, "neuron set"),
        ({"0.gate.row": [[1]]}, {}, "list of int64"),
        ({"0.gate.row": [0.5]}, {}, "list of int64"),
        ({}, {"format": "pt"}, "'pt'"),
        ({}, {"shape": "{}"}, "layers"),
        ({}, {"shape": "[1]"}, "neuron set"),
        ({}, {"provenance": "{"}, "neuron set"),
        ({}, {"provenance": "[1]"}, "not a table"),
        ({"0.gate.row": [1]}, {}, "carries no digest: an older slicetune or another program wrote it"),
        ({"0.gate.row": [1]}, {"fingerprint": "0" * 16}, "changed since it was written"),
    ],
)
def test_bad_file_is_refused_in_one_line_that_names_it(tmp_path, tensors, about, says):
    path = tmp_path / "neurons.safetensors"
    save_file({name: torch.tensor(index) for name, index in tensors.items()}, path, metadata(**about))
    with pytest.raises(UserError, match=says) as error:
        NeuronSet.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_truncated_and_huge_headers_are_refused(tmp_path):
    path = tmp_path / "neurons.safetensors"
    with pytest.raises(UserError, match="no such file"):
        NeuronSet.load(path)
    channels().save(path)
    whole = path.read_bytes()
    for broken in (whole[:-3], (2**62).to_bytes(8, "little") + whole[8:], b"", b"PK\x03\x04"):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="neuron set"):
            NeuronSet.load(path)


def test_describe_counts_by_projection_and_depth():
    neurons = channels()
    neurons.provenance = {"method": "caneft", "sentences": {"it": 2000, "law": 1500}}
    text = neurons.describe().splitlines()
    assert text[0].startswith("4 of 80 neurons (5.00%), 18 trainable parameters (5.00% of the FFNs)")
    assert text[2].split() == ["gate", "rows", "2", "0", "0", "2", "6.67%"]
    assert text[3].split() == ["up", "rows", "0", "1", "0", "1", "3.33%"]
    assert "3 of 5 layers have none and stay frozen" in text
    assert "sentences: it 2,000, law 1,500" in text
    assert units().describe().startswith("6 slices, 24 trainable parameters")


def test_thirds_are_those_of_the_paper_and_cover_every_layer_once():
    assert thirds(32) == (range(0, 11), range(11, 21), range(21, 32))
    for layers in range(1, 50):
        lower, middle, upper = thirds(layers)
        assert [*lower, *middle, *upper] == list(range(layers))


def test_one_tensor_for_several_projections_is_saved(tmp_path):
    index = torch.tensor([1, 4])
    neurons = NeuronSet({(3, "gate", "row"): index, (3, "up", "row"): index}, 5, SHAPE.widths, SHAPE.fan_in)
    neurons.save(tmp_path / "n.safetensors")
    assert NeuronSet.load(tmp_path / "n.safetensors").fingerprint == neurons.fingerprint
