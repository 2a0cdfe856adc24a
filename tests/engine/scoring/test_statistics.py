"""Statistics: the same histogram in any order of samples, sums by group, files that come back exactly."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from slicetune.engine.common.errors import UserError
from slicetune.engine.scoring.statistics import Statistics
from slicetune.kernels.histogram import bins, count

SHAPE = SimpleNamespace(
    layers=3, widths={"gate": 5, "up": 5, "down": 4}, fan_in={"gate": 4, "up": 4, "down": 5}, intermediate=5
)
SAMPLES = 60


def draw(seed: int = 0) -> tuple[dict, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores by (layer, projection), groups, unit activity and activation, as a scoring pass hands them over."""
    generator = torch.Generator().manual_seed(seed)
    scores = {
        (layer, p): torch.exp(torch.randn(SAMPLES, w, generator=generator) * 2 - 14)
        for layer in range(SHAPE.layers)
        for p, w in SHAPE.widths.items()
    }
    groups = torch.randint(0, 2, (SAMPLES,), generator=generator)
    active = torch.randint(0, 9, (SAMPLES, 5), generator=generator, dtype=torch.int32)
    return scores, groups, active, torch.randn(SAMPLES, 5, generator=generator)


def collect(order: torch.Tensor, batches: int, shape=SHAPE) -> Statistics:
    """Statistics of the drawn samples, in this order and so many batches."""
    scores, groups, active, activation = draw()
    stats = Statistics(["it", "law"], shape)
    for rows in order.chunk(batches):
        for (layer, projection), values in scores.items():
            stats.add_scores(layer, projection, values[rows], groups[rows])
        for layer in range(SHAPE.layers):
            stats.add_units(layer, active[rows], activation[rows], torch.ones(len(rows)), groups[rows])
        stats.add_samples(groups[rows], rows + 1)
    return stats


def test_histogram_counts_every_score_in_its_bin():
    scores, groups, _, _ = draw()
    stats = collect(torch.arange(SAMPLES), 4)
    for (layer, projection), values in scores.items():
        mantissa, exponent = np.frexp(values.double().numpy())  # value = mantissa · 2^exponent, mantissa in [0.5, 1)
        expected = (exponent - 1 + 40) * 8 + np.floor((2 * mantissa - 1) * 8).astype(int)
        for group in range(2):
            for neuron in range(values.shape[1]):
                own = np.bincount(expected[groups.numpy() == group, neuron], minlength=256)
                np.testing.assert_array_equal(stats.histogram[projection][group, layer, neuron].numpy(), own)


@pytest.mark.parametrize("batches", [1, 7, SAMPLES])
def test_any_order_of_samples_and_batches_gives_the_same_bits(batches):
    one = collect(torch.arange(SAMPLES), 1)
    other = collect(torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(5)), batches)
    for projection in SHAPE.widths:
        assert torch.equal(one.histogram[projection], other.histogram[projection])
        torch.testing.assert_close(one.total[projection], other.total[projection], rtol=1e-14, atol=0)
    assert torch.equal(one.samples, other.samples)
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.active, other.active)


def test_sums_are_by_group_and_in_double_precision():
    scores, groups, active, activation = draw()
    stats = collect(torch.arange(SAMPLES), 4)
    for group in range(2):
        own = groups == group
        assert stats.samples[group] == own.sum()
        assert stats.tokens[group] == (torch.arange(SAMPLES) + 1)[own].sum()
        for (layer, projection), values in scores.items():
            expected = values[own].double().sum(0)
            torch.testing.assert_close(stats.total[projection][group, layer], expected, rtol=1e-14, atol=0)
        for layer in range(SHAPE.layers):
            assert torch.equal(stats.active[group, layer], active[own].long().sum(0))
            torch.testing.assert_close(stats.activation[group, layer], activation[own].double().sum(0))


def test_counts_on_another_device_than_the_scores_are_the_same():
    scores, groups, _, _ = draw()
    stats = collect(torch.arange(SAMPLES), 1)
    for (layer, projection), values in scores.items():
        counts = torch.zeros(2, values.shape[1], 256, dtype=torch.int32)
        count(bins(values, -40), groups, counts)
        assert torch.equal(counts, stats.histogram[projection][:, layer])


def test_clamped_share_counts_what_lies_outside_but_not_zero():
    shape = SimpleNamespace(layers=1, widths={"gate": 8}, fan_in={"gate": 1}, intermediate=1)
    stats = Statistics(["it"], shape, lowest_octave=-40)
    scores = torch.tensor([[0.0, 2.0**-41, 2.0**-40, 2.0**-8, 2.0**-8.1, 1e-45, 1.0, 2.0**-20]])
    stats.add_scores(0, "gate", scores, torch.tensor([0]))
    stats.add_samples(torch.tensor([0]), torch.tensor([3]))
    assert (int(stats.clamped_low), int(stats.clamped_high)) == (2, 2)
    assert stats.clamped_share == 4 / 8
    assert stats.histogram["gate"][0, 0].argmax(-1).tolist() == [0, 0, 0, 255, 254, 0, 255, 160]


@pytest.mark.parametrize("sentences", [SAMPLES, 70_000])
def test_file_comes_back_exactly(tmp_path, sentences):
    """70,000 sentences a group do not fit the narrow integers of the small file."""
    stats = collect(torch.arange(SAMPLES), 3)
    stats.histogram["up"][1, 2, 3, 40] += sentences
    stats.samples += sentences
    stats.save(tmp_path / "statistics.safetensors", {"model": "abc", "data": [1, 2]})
    back = Statistics.load(tmp_path / "statistics.safetensors")
    for name, tensor in stats._small().items():
        assert torch.equal(back._small()[name], tensor), name
    for projection, counts in stats.histogram.items():
        assert back.histogram[projection].dtype == torch.int32
        assert torch.equal(back.histogram[projection], counts)
    assert back.provenance == {"model": "abc", "data": [1, 2]}
    assert (back.groups, back.layers, back.widths, back.fan_in) == (["it", "law"], 3, SHAPE.widths, SHAPE.fan_in)
    assert [path.name for path in tmp_path.iterdir()] == ["statistics.safetensors"]
    back.add_scores(0, "gate", torch.ones(1, 5), torch.tensor([1]))  # counting goes on
    sums = Statistics.sums(tmp_path / "statistics.safetensors")
    assert all(torch.equal(sums._small()[name], tensor) for name, tensor in stats._small().items())
    assert sums.neurons == stats.neurons
    assert not any(counts.numel() for counts in sums.histogram.values())


def damage_truncated(path):
    path.write_bytes(path.read_bytes()[:-10])


def damage_header(path):
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])


def damage_missing(path):
    path.unlink()


def damage_other_format(path):
    path.write_bytes(path.read_bytes().replace(b"slicetune.statistics", b"slicetune.statistocs"))


def damage_shape(path):
    path.write_bytes(path.read_bytes().replace(b'\\"layers\\": 3', b'\\"layers\\": 4'))


@pytest.mark.parametrize("damage", [damage_truncated, damage_header, damage_missing, damage_other_format, damage_shape])
def test_broken_file_is_refused_in_one_line_that_names_it(tmp_path, damage):
    path = tmp_path / "statistics.safetensors"
    collect(torch.arange(SAMPLES), 1).save(path)
    before = path.read_bytes()
    damage(path)
    assert not path.exists() or path.read_bytes() != before
    with pytest.raises(UserError) as error:
        Statistics.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_settings_are_refused():
    with pytest.raises(UserError, match=r"from 2\^100"):
        Statistics(["it"], SHAPE, lowest_octave=100)
    with pytest.raises(UserError, match="twice"):
        Statistics(["it", "it"], SHAPE)
