"""Settings as JSON and back, and in what two of them differ."""

import json

import pytest

from slicetune.engine.common import settings
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


def test_a_run_keeps_nothing_that_a_command_alone_reads(tmp_path):
    config = RunConfig(dry_run=True, gpus=8, gpu_memory=24.0, shape="Llama-3.1-8B")
    assert as_dict(config).keys() - settings.kept(config).keys() == {"dry_run", "gpus", "gpu_memory", "shape"}
    (tmp_path / "config.json").write_text(json.dumps(as_dict(RunConfig(shape="Llama-3.1-8B"))))
    assert read_run(tmp_path).shape == "Llama-3.1-8B"  # of a run by an older version


def test_which_settings_decide_which_stage():
    """What a finished stage is held to: a setting that is missing here could change a result without a word."""
    config, of_stage = RunConfig(), settings.of_stage
    assert of_stage(config.score, "score").keys() == {"loss", "tokens", "token_reduce"}
    training = "learning_rate sweep epochs max_steps global_batch_size micro_batch_size lr_scheduler warmup_steps "
    training += "weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm eval_steps load_best"
    assert " ".join(of_stage(config.train, "train")) == training
    assert of_stage(config.evaluate, "decode").keys() == {"max_new_tokens"}
    assert of_stage(config.evaluate, "export").keys() == {"dtype"}
    scoring = "pair pairs seen prompt score_sentences max_length"
    assert " ".join(of_stage(config.data, "score")) == scoring
    assert " ".join(of_stage(config.data, "train")) == "train_pairs train_sentences budget dev_sentences"
    assert of_stage(config.data, "decode").keys() == {"unseen", "test_sentences"}
