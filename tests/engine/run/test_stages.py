"""A finished stage is not run again, and what changes it is refused: settings, and what is in the files they name."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import toys
from torch import nn

from slicetune.engine.common import checkpoint
from slicetune.engine.common.errors import UserError
from slicetune.engine.common.files import contents
from slicetune.engine.data.config import DataConfig
from slicetune.engine.evaluation import results
from slicetune.engine.export.live import chosen_masters
from slicetune.engine.methods.base import Base, Full
from slicetune.engine.methods.caneft.settings import Caneft
from slicetune.engine.methods.given import Given
from slicetune.engine.methods.lape import Lape
from slicetune.engine.methods.llama_pro import LlamaPro
from slicetune.engine.methods.lora import Lora
from slicetune.engine.models.config import ModelConfig
from slicetune.engine.run import compare, train
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
    monkeypatch.setattr(train, "_choose", lambda *found, **of: None)
    no_dev = DataConfig(dev_sentences=0)  # and so the model is not asked whether it knows the prompt
    config = RunConfig(method=Full(), data=no_dev, train=TrainConfig(learning_rate=1e-5, sweep=(1e-4, 1e-3)))
    shape = SimpleNamespace(parameters=6)
    made = {"stage": 1, "model": lambda stage: nn.Linear(2, 2), "training_once_chosen": lambda: config}
    job = SimpleNamespace(config=config, out=tmp_path, pad_id=0, shape=shape, **made)
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


@pytest.mark.parametrize("sweep", [True, False])
def test_a_sweep_of_one_rate_is_a_sweep_like_any_other(sweep, tmp_path, capsys):
    """Its metrics lie with the rate's checkpoints: the run's own metrics.jsonl is a copy of them."""
    folder = tmp_path / "sweep" / "lr-0.001" if sweep else tmp_path
    checkpoint.save(folder / "checkpoints" / "step-3", {}, {"step": 3, "best_dev_loss": 0.5})
    (folder / "metrics.jsonl").write_text('{"step": 3, "tokens_per_second": 10.0}\n')
    counts = {"trainable_parameters": 6, "added_parameters": 0, "peak_memory_bytes": 1}
    train._choose(tmp_path, {1e-3: folder / "checkpoints" / "step-3"}, counts, sweep)
    assert results.training(tmp_path)["tokens_per_second"] == 10.0
    assert ("learning rate 0.001: dev loss 0.5000  ← taken" in capsys.readouterr().out) == sweep
    assert chosen_masters(tmp_path) == {}


def test_a_file_that_training_should_have_left_is_one_line(tmp_path):
    (tmp_path / "chosen.json").write_text("{}")
    for reads, name in ((results.training, r"metrics\.jsonl"), (chosen_masters, r"chosen\.json")):
        with pytest.raises(UserError, match=f"{name}: not what training leaves"):
            reads(tmp_path)


def entry(label: str, config: RunConfig) -> compare.Entry:
    return compare.Entry(label, config, config)


def test_a_comparison_checks_all_recipes_before_the_first_starts(tmp_path, monkeypatch):
    """Layers of which a BLOOM has some alone: the last recipe would end a job that has run for hours."""
    started = []
    monkeypatch.setattr(compare, "run_one", lambda config: started.append(config))
    toys.model_of_bytes("bloom").save_pretrained(tmp_path / "bloom")
    model = ModelConfig(path=str(tmp_path / "bloom"))
    given = compare.CompareConfig(recipes=(), out=tmp_path / "out")
    entries = [
        entry("base_x", RunConfig(model=model, method=Base())),
        entry("lora_x", RunConfig(model=model, method=Lora(target_modules=("dense", "q_proj")))),
    ]
    monkeypatch.setattr(compare, "plan", lambda own, rest: entries)
    with pytest.raises(UserError, match=r"lora_x: --method\.target-modules: bloom has dense, but not q_proj: name"):
        compare.run(given, [])
    assert not started
    deep = RunConfig(model=model, method=LlamaPro(blocks=9))
    with pytest.raises(UserError, match=r"pro: --method\.blocks 9"):
        compare.check_all([entry("pro", deep)])
    compare.check_all(entries[:1])
    llamas = entry("lora_y", RunConfig(model=model, method=Lora(target_modules=("q_proj", "k_proj"))))
    compare.check_all([llamas])  # all linear layers are taken, and the run says so
    follower = entry("lape_x", RunConfig(model=model, method=Lape(neuron_ratio=1e-6)))
    with pytest.raises(UserError, match=r"lape_x: lape wants 0 units"):
        compare.check_all([follower])
    compare.check_all([follower, entry("caneft_x", RunConfig(model=model, method=Caneft(neuron_ratio=0.05)))])
