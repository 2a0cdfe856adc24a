"""bench/study_settings.py: what does not fit is said before anything runs; other settings are not counted."""

import re

import pytest
import toys
from studies import LINES, PLAN, finished

from slicetune.engine.common.errors import UserError

pytestmark = pytest.mark.usefixtures("bench")


def test_runs_of_other_settings_are_not_counted(tmp_path, written, capsys):
    """Neither those of other flags, nor what starts from them, nor what was tried again and has not ended."""
    from study import Study
    from study_numbers import collect
    from study_plan import read

    rate = ("--train.learning-rate", "0.001")
    study = Study(read(str(written)), tmp_path, [], [], 1)
    finished(study.folder("rates", "full", 0), "full", LINES, 0.5)
    finished(study.folder("main", "base", 0), "base", LINES, None)
    finished(study.folder("main", "full", 0), "full", LINES, 0.5, *rate, "--train.epochs", "2")
    finished(study.folder("main", "full", 1), "full", LINES, 0.5, *rate, "--train.epochs", "3")
    for seed in (0, 1):
        finished(study.folder("second", "full_second", seed), "full", LINES, 0.5, *rate, "--train.epochs", "1")
    assert {label: list(row["seeds"]) for label, row in collect(study)["rows"].items()} == {
        "base": ["0"],
        "full": ["1"],
        "full_second": ["1"],
    }
    said = capsys.readouterr().err
    assert "not counted, 1 run(s)" in said
    assert f"{tmp_path}/main/full/seed-0 (train.epochs: 2 → 3)" in said
    (study.folder("main", "full", 1) / "status.json").write_text('{"state": "failed"}')
    assert list(collect(study)["rows"]) == ["base"]
    other = Study(study.plan, tmp_path, [], ["--data.test-sentences", "7"], 1)
    assert not collect(other)["rows"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("base_tiny", "bass_tiny", "study trial, job main, row base: bass_tiny: no such recipe"),
        ('seen = ["it"]\n[', 'seen = ["it", "law"]\n[', "part seen: no run is tested on law: name some of it"),
        ('rate = "full", ', '"data.test-sentences" = 3, ', "rows base and full are tested on different sentences"),
        ("full_second", "base_second", "row base_second: Base of row base leaves no model to start from"),
        ('"train.epochs" = 3', '"train.eppochs" = 3', "row full: the box above names the flag that is wrong"),
        ('"train.epochs" = 3', '"train.epochs" = -3', "row full: --train.epochs -3"),
        ('"train.epochs" = 1', '"data.dev-sentences" = 0', "job rates, row full: --train.sweep chooses by dev loss"),
        ('"train.epochs" = 1', '"evaluate.smooth" = "none"', "--evaluate.smooth none: a study's intervals"),
    ],
)
def test_what_a_row_would_stop_at_is_said_before_the_first_runs(tmp_path, written, old, new, said):
    import study_settings
    from study import Study
    from study_plan import read

    toys.model_of_bytes("llama").save_pretrained(tmp_path)
    first = ["--model.path", str(tmp_path)]
    study_settings.ready(Study(read(str(written)), tmp_path, first, [], 1))
    assert old in PLAN
    written.write_text(PLAN.replace(old, new, 1))
    with pytest.raises(UserError, match=re.escape(said)):
        study_settings.ready(Study(read(str(written)), tmp_path, first, [], 1))


def test_numbers_of_another_model_of_that_name_are_kept(tmp_path):
    from study import of_others, writable

    file = tmp_path / "study-trial.json"
    file.write_text('{"toy": {"fingerprint": "a"}, "old": {}}')
    assert list(of_others(file, "toy", "a")) == list(of_others(file, "old", "b")) == ["toy", "old"]
    with pytest.raises(UserError, match="has numbers of another model that is called toy"):
        of_others(file, "toy", "b")
    with pytest.raises(UserError, match=r"--results .*: cannot be written to"):
        writable(file, "--results")
