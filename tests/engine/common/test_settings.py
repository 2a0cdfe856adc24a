"""Settings as JSON and back, and in what two of them differ."""

import json

import pytest

from slicetune.engine.common.errors import UserError
from slicetune.engine.common.settings import as_dict, differences, table
from slicetune.engine.methods.caneft.settings import Caneft, Rcn
from slicetune.engine.methods.kinds import method_from
from slicetune.engine.methods.lape import Lape
from slicetune.engine.methods.lora import Lora
from slicetune.engine.run.config import RunConfig, read_run
from slicetune.engine.training.config import TrainConfig


@pytest.mark.parametrize("method", [Caneft(consensus=None), Rcn(), Lape(neuron_ratio=0.5), Lora(rank=3)])
def test_settings_are_read_as_they_were_written(tmp_path, method):
    config = RunConfig(out="x", method=method, train=TrainConfig(sweep=(1e-5, 1e-3)), seed=5)
    (tmp_path / "config.json").write_text(json.dumps(as_dict(config)))
    assert read_run(tmp_path) == config
    assert type(read_run(tmp_path).method) is type(method)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"method": {"kind": "x"}}', '{"method": {"kind": "caneft", "y": 1}}']
)
def test_broken_settings_are_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json: not the settings of a run"):
        read_run(tmp_path)


@pytest.mark.parametrize("stored", [{}, {"kind": "x"}, {"kind": {}}, {"kind": "caneft", "y": 1}])
def test_a_method_of_another_version_is_one_line(stored):
    with pytest.raises(UserError, match="this run is of another version"):
        method_from(stored)


def test_differences_are_named_by_their_path():
    old, new = as_dict(RunConfig()), as_dict(RunConfig(seed=3, train=TrainConfig(learning_rate=1e-3)))
    rows = differences(old, new)
    assert rows == [("seed", 0, 3), ("train.learning_rate", 1e-5, 1e-3)]
    assert table(rows) == "seed: 0 → 3; train.learning_rate: 1e-05 → 0.001"
    assert table(rows, most=1) == "seed: 0 → 3; and 1 more"
    assert differences(old, old) == []
