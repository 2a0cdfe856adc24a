"""A finished stage is not run again, and what changes it is refused: settings, and what is in the files they name."""

from __future__ import annotations

import json

import pytest

from slicetune.engine.common.errors import UserError
from slicetune.engine.common.files import contents
from slicetune.engine.methods.caneft.settings import Caneft
from slicetune.engine.methods.given import Given
from slicetune.engine.methods.lape import Lape
from slicetune.engine.run.config import RunConfig
from slicetune.engine.run.job import Job
from slicetune.engine.run.stages import Stages


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
