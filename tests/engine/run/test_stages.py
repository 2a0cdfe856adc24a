"""A finished stage is not run again, and what changes it is refused: settings, and what is in the files they name."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from torch import nn

from slicetune.engine.common.errors import UserError
from slicetune.engine.common.files import contents
from slicetune.engine.methods.base import Full
from slicetune.engine.methods.caneft.settings import Caneft
from slicetune.engine.methods.given import Given
from slicetune.engine.methods.lape import Lape
from slicetune.engine.run import train
from slicetune.engine.run.config import RunConfig
from slicetune.engine.run.job import Job
from slicetune.engine.run.stages import Stages
from slicetune.engine.training.config import TrainConfig


def select_stage(tmp_path, method) -> list[str]:
    """The select stage of a run's folder, begun anew as a later command would; says whether its work was done."""
    job, ran = Job.__new__(Job), []
    job.config = RunConfig(method=method)
    Stages(tmp_path).do("select", job.method_settings(), tmp_path / "artefact", lambda: ran.append("select"))
    (tmp_path / "artefact").write_text("made")
    return ran


@pytest.mark.parametrize("kind", [Given, Lape])
def test_a_changed_file_is_a_changed_setting(kind, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([[0, "gate", 1]]))
    method = Given(files=(str(file),)) if kind is Given else Lape(match=str(file))
    assert select_stage(tmp_path, method) == ["select"]
    assert select_stage(tmp_path, method) == []
    file.write_text(json.dumps([[0, "gate", 2]]))
    with pytest.raises(UserError, match=rf"method_files.*mine\.json: {'[0-9a-f]' * 16} → "):
        select_stage(tmp_path, method)
    file.unlink()
    with pytest.raises(UserError, match=r"mine\.json: cannot be read"):
        select_stage(tmp_path, method)


def test_a_method_that_reads_no_file_has_the_settings_that_it_had(tmp_path):
    assert contents(Caneft().reads) == contents(Lape().reads) == {}
    select_stage(tmp_path, Caneft())
    assert set(json.loads((tmp_path / "stages.json").read_text())["select"]["settings"]) == {"method"}


def test_trackers_see_the_rate_of_each_training_of_a_sweep(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "train", lambda model, config, setup, *rest: seen.append(setup.settings["train"]))
    monkeypatch.setattr(train, "_choose", lambda *found: None)
    config = RunConfig(method=Full(), train=TrainConfig(learning_rate=1e-5, sweep=(1e-4, 1e-3)))
    shape = SimpleNamespace(parameters=6)
    job = SimpleNamespace(config=config, out=tmp_path, pad_id=0, shape=shape, model=lambda: nn.Linear(2, 2))
    train.train_and_choose(job, [], [], {})
    assert [(one["learning_rate"], one["sweep"]) for one in seen] == [(1e-4, []), (1e-3, [])]


@pytest.mark.parametrize("scores", [True, False])
def test_scores_are_offered_to_another_folder_where_there_are_some(scores, tmp_path):
    def go(rate: float) -> None:
        stages = Stages(tmp_path)
        for name in ["score"] * scores + ["train"]:
            settings = {"rate": rate} if name == "train" else {}
            stages.do(name, settings, tmp_path / name, (tmp_path / name).touch)

    go(1e-4)
    with pytest.raises(UserError, match=r"rate: 0.0001 → 0.001.*use another --out") as refused:
        go(1e-3)
    assert ("--score.reuse" in str(refused.value)) == scores
