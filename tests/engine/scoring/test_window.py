"""The histogram's window: where the scores lie, the same on any number of ranks, and of no setting."""

from __future__ import annotations

import json

import pytest
import torch
import toys

from slicetune.engine.common.files import write_json
from slicetune.engine.common.settings import as_dict, differences
from slicetune.engine.models.shapes import from_config
from slicetune.engine.run.config import RunConfig, read_run
from slicetune.engine.scoring import window
from slicetune.engine.scoring.config import ScoreConfig
from slicetune.engine.scoring.score import scored


def counts(**octaves: int) -> torch.Tensor:
    """Scores by octave: `m8=5` are five from 2^-8 on."""
    made = torch.zeros(256, dtype=torch.int64)
    for name, count in octaves.items():
        made[127 + int(name.replace("m", "-").replace("p", ""))] = count
    return made


@pytest.mark.parametrize(
    ("found", "lowest"),
    [
        (counts(m30=5, m11=5), -36),  # 20 octaves: six free below and above
        (counts(m40=1, m9=1), -40),  # as many as there are
        (counts(m60=1, m20=100, p5=100), -23),  # too many: the few are left out
        (counts(p127=3), 96),
        (counts(m126=3), -126),
        (counts(), -40),
    ],
)
def test_the_window_holds_most_scores_and_leaves_room_on_both_sides(found, lowest):
    start = window.window(found)
    assert start == lowest
    assert found[127 + start : 127 + start + 32].sum() >= found.sum() - 1


def test_zeros_and_what_is_not_finite_have_no_octave():
    found = window.Octaves()
    sums = torch.tensor([[0.0, 1e-45, float("inf"), float("nan"), 3.0]])
    found.add_sums(0, "gate", sums, torch.tensor([2.0]), torch.tensor([0]))
    assert window.window(found.counts) == window.window(counts(p0=1))


def test_a_few_batches_over_all_lengths_are_looked_at():
    assert window.spread([]) == []
    assert window.spread([[0], [1], [2]]) == [[1]]
    assert window.spread([[i] for i in range(80)]) == [[10], [30], [50], [70]]


@pytest.mark.parametrize("scale", [2.0**-30, 2.0**24])
def test_no_score_is_out_of_range_whatever_the_models_scale(scale, tmp_path):
    """A scaled head scales the loss's gradient: 2^-30 to 2^24 had been out of any fixed window."""
    model, examples = toys.model(), toys.examples(60)
    hook = model.model.norm.register_full_backward_hook(lambda module, got, given: (got[0] * scale,))
    shape, config = from_config(model.config), ScoreConfig(tokens_per_batch=40)
    stats, clear = scored(lambda: model, examples, ["a", "b"], shape, config, tmp_path, {}, 0)
    hook.remove()
    clear()
    assert stats.clamped_share < 1e-3
    assert stats.histogram["gate"].sum() == 60 * stats.layers * stats.widths["gate"]


def test_every_rank_takes_the_same_window_as_one_alone(pool, tmp_path):
    config = ScoreConfig(tokens_per_batch=40)
    alone = window.choose(toys.model(), toys.examples(60), config)
    assert pool.run("window_of_toys", 60, 40) == [alone, alone]


def test_what_an_older_version_has_scored_is_taken(tmp_path):
    """Its settings name the window that it had."""
    now = as_dict(RunConfig())
    old = json.loads(json.dumps(now)) | {"score": {**now["score"], "lowest_octave": -40}}
    assert not differences({"score": {"lowest_octave": -40, "loss": "mean"}}, {"score": {"loss": "mean"}})
    write_json(tmp_path / "config.json", old)
    assert read_run(tmp_path) == RunConfig()
