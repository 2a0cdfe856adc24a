"""Every analysis as a command, on a run as a user has it: what each leaves, and what its tables say."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slicetune.engine.data import tiny
from slicetune.engine.slices.neurons import NeuronSet

JOBS = Path(__file__).parents[2] / "support/analysis_jobs.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("analyses") / "run"
    command = [sys.executable, str(JOBS), str(tiny.model_dir("test")), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out, done.stdout


def rows(run: tuple[Path, str], name: str) -> list[dict[str, str]]:
    with (run[0] / "analyses" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_question_leaves_a_page(run):
    pages = {path.stem for path in (run[0] / "analyses").glob("*.html")}
    assert pages == {"chosen", "overlap", "silence", "control", "ratios", "readings", "change"}
    report = (run[0] / "report.html").read_text()
    for page in pages:
        html = (run[0] / "analyses" / f"{page}.html").read_text()
        assert "<svg" in html, page
        assert "http" not in html, page
        assert f'href="analyses/{page}.html"' in report
    assert "http" not in report


def test_chosen_counts_every_neuron(run):
    neurons = NeuronSet.load(run[0] / "neurons.safetensors")
    assert sum(int(row["chosen"]) for row in rows(run, "chosen-map")) == neurons.count
    bars = rows(run, "chosen-histogram")
    assert sum(int(row["neurons"]) for row in bars) == neurons.total
    assert sum(int(row["chosen"]) for row in bars) == neurons.count


def test_ratios_train_what_they_say(run):
    found = rows(run, "ratios-bleu")
    assert [row["neurons, %"] for row in found] == ["0.0", "2.0", "4.0"]
    own = json.loads((run[0] / "results.json").read_text())
    other = NeuronSet.load(run[0] / "analyses/ratios/0.04/neurons.safetensors")
    assert [int(row["trained"]) for row in found] == [0, own["trainable_parameters"], other.parameters()]
    scores = (run[0] / "statistics.safetensors", run[0] / "analyses/ratios/0.04/statistics.safetensors")
    assert os.path.samefile(*scores)  # taken over, not made again


def test_readings_compare_with_the_run(run):
    found = {row["reading"]: row for row in rows(run, "readings-all")}
    assert list(found)[:2] == ["default", "random neurons"]
    assert list(found)[-1] == "untrained base"
    assert set(found) >= {"tokens target", "token_reduce abs_sum", "task merge union", "joint, task ratio none"}
    assert float(found["default"]["difference"]) == 0.0
    base = float(found["untrained base"]["dev loss"]) - float(found["default"]["dev loss"])
    assert base == pytest.approx(float(found["untrained base"]["difference"]))
    seeds = rows(run, "readings-seeds")
    assert seeds[0]["reading"] == "default"
    assert len(seeds) == 2
    assert all("±" in row["BLEU seen"] for row in seeds)


def test_the_default_trains_to_the_same_loss_as_the_run(run):
    """The run's own training again, at its seed: the same neurons, the same bits."""
    (folder,) = {
        path.parent
        for path in (run[0] / "analyses/readings/seed-0").glob("*/chosen.json")
        if json.loads((path.parent / "config.json").read_text())["method"]
        == json.loads((run[0] / "config.json").read_text())["method"]
        and json.loads((path.parent / "config.json").read_text())["score"]["tokens"] == "all"
        and json.loads((path.parent / "config.json").read_text())["score"]["token_reduce"] == "mean_abs"
    }
    mine, theirs = (json.loads((path / "chosen.json").read_text())["dev_loss"] for path in (folder, run[0]))
    assert mine == theirs


def test_control_and_silence_have_every_row(run):
    found = rows(run, "control-information")
    names = ["as the run", "other sentences", "matched", "no name", "matched, no name", "target tokens", "shuffled"]
    assert [row["condition"] for row in found] == names
    assert len({row["a domain"] for row in found}) == 1
    assert float(found[0]["target length"]) > float(found[2]["target length"])  # matching took most of it away
    assert len(rows(run, "silence-channels")) == 9
    assert [row["projection"] for row in rows(run, "silence-correlation")] == ["gate", "up", "down", "all"]


def test_overlap_of_the_set_with_itself_is_one(run):
    found = rows(run, "overlap-share")  # of the two runs: the later command's
    assert [float(row[row[""]]) for row in found] == [1.0, 1.0]
    assert float(found[0]["0.04"]) == 1.0  # 4 % hold the 2 %
