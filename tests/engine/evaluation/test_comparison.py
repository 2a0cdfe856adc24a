"""Several methods in one table: its arithmetic, and a comparison as a user starts it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sacrebleu

from slicetune.engine.common.errors import UserError
from slicetune.engine.common.files import write_lines
from slicetune.engine.data import tiny
from slicetune.engine.data.config import DataConfig
from slicetune.engine.evaluation import comparison
from slicetune.engine.evaluation.comparison import Row, columns, mean_deviation, ranks
from slicetune.engine.evaluation.report import comparison as comparison_report
from slicetune.engine.methods.base import Full
from slicetune.engine.methods.caneft.settings import Caneft, Rcn
from slicetune.engine.methods.lape import Lape
from slicetune.engine.models.config import ModelConfig
from slicetune.engine.run import compare
from slicetune.engine.run.config import RunConfig

RECIPES = Path(__file__).parents[3] / "recipes"


def results(method: str, it: float, koran: float) -> dict:
    domains = {"it": {"bleu": it, "chrf": it + 20}, "koran": {"bleu": koran, "chrf": koran + 20}}
    means = {"seen": domains["it"], "unseen": domains["koran"], "all": {"bleu": (it + koran) / 2, "chrf": 0.0}}
    found = {"systems": {method: {"domains": domains, "averages": means}}, "seen": ["it"], "unseen": ["koran"]}
    if method != "base":
        found |= {"trainable_parameters": 10, "added_parameters": 0, "train_sentences": 5, "learning_rate": 1e-05}
        found |= {"sweep": {"1e-05": 2.5}, "peak_memory_bytes": 10**9, "tokens_per_second": 100.0}
    return found | {"method": method, "seconds": {"train": 2.0, "translate": 1.0}}


def row(method: str, *seeds: tuple[float, float], label: str = "") -> Row:
    return Row(label or method, method.upper(), [results(method, *s) for s in seeds], [Path()] * len(seeds))


def test_means_and_ranks():
    assert mean_deviation([2.0, 4.0, 9.0]) == (5.0, pytest.approx(np.std([2, 4, 9], ddof=1)))
    assert math.isnan(mean_deviation([3.0])[1])
    infinite, none = mean_deviation([math.inf, math.inf])  # dev losses without dev sentences
    assert infinite == math.inf
    assert math.isnan(none)
    assert ranks([1.0, 3.0, math.nan, 3.0, 2.0]) == [0, 1, 0, 1, 2]


def test_tables():
    rows = [row("base", (10, 5)), row("caneft", (20, 5), (30, 7)), row("lora", (25, 1))]
    assert columns(rows) == ["it", "seen", "koran", "unseen", "all"]
    bleu, chrf, cost = comparison.tables(rows, {"bleu": {"caneft": {"it": 0.01}, "lora": {"it": 0.2}}})
    cells = dict(bleu.rows)
    assert [cells[name][0].text for name in ("BASE", "CANEFT", "LORA")] == ["10.00", "25.00 ± 7.07", "25.00"]
    assert [cells[name][0].rank for name in ("BASE", "CANEFT", "LORA")] == [2, 1, 1]
    assert [cells[name][0].significant for name in ("BASE", "CANEFT", "LORA")] == [False, True, False]
    assert (chrf.title, cost.rows[0][1][0].text) == ("chrF", "0")
    assert [cell.text for cell in cost.rows[1][1]][:5] == ["10", "0", "5", "1e-05", "2.5000"]
    text = comparison_report.terminal([bleu, chrf, cost])
    assert "25.00 ± 7.07¹*" in text
    assert "**25.00 ± 7.07**\\*" in comparison_report.markdown([bleu])
    page = comparison_report.html("A", "b\n\nc", [bleu], rows)
    assert "<b>25.00 ± 7.07*</b>" in page
    assert "<u>10.00</u>" in page
    assert "Bold and underlined mark the best and the second best" in page
    assert '<p class="soft">b</p>' in page
    assert "¹" not in page
    assert "¹ and ² mark the best and the second best" in text
    assert "Bold and italics mark the best and the second best" in comparison_report.markdown([bleu])
    read = json.loads(comparison.as_json(rows, {}))
    assert read["rows"]["caneft"]["mean_deviation"]["bleu"]["seen"] == [25.0, pytest.approx(50**0.5)]
    assert read["rows"]["base"]["mean_deviation"]["bleu"]["seen"] == [10.0, None]


def test_several_directions_are_columns(tmp_path):
    found = {
        name: results(name, 10, 5) | {"pairs": {"de-en": ["de-en/it", "de-en/law"], "en-zh": ["en-zh/it"]}}
        for name in ("base", "few_shot")
    }
    rows = []
    for name, run in found.items():
        run["unseen"] = []
        run["systems"][name]["pairs"] = {"de-en": {"bleu": 7.0}, "en-zh": {"bleu": 8.0, "bleu_13a": 1.0}}
        run["systems"][name]["averages"]["all"] = {"bleu": 7.5, "bleu_13a": 4.0}
        rows.append(Row(name, name, [run], [tmp_path / name]))
        good = name == "few_shot"
        for domain, lines in (("de-en/it.en", 30), ("de-en/law.en", 30), ("en-zh/it.zh", 40)):
            texts = [f"the {i} line is a good one" for i in range(lines)]
            write_lines(tmp_path / name / "translations" / "reference" / domain, texts)
            write_lines(
                tmp_path / name / "translations" / name / domain, texts if good and "law" in domain else ["no"] * lines
            )
    assert columns(rows) == ["de-en", "en-zh", "all"]
    bleu, as_printed, *_ = comparison.tables(rows, {})
    assert [cell.text for cell in bleu.rows[0][1]] == ["7.00", "8.00", "7.50"]
    assert as_printed.title == "BLEU, tok 13a throughout"
    assert [cell.text for cell in as_printed.rows[0][1]] == ["7.00", "1.00", "4.00"]
    p = comparison.p_values(rows, "de")["bleu"]["few_shot"]
    assert p["de-en"] < 0.01  # half of the direction's sentences are right
    assert p["en-zh"] == 1.0  # the same lines


def test_p_values_are_those_of_a_bootstrap_written_out(tmp_path):
    words = ["the", "a", "cat", "dog", "sat", "ran", "on", "mat", "far", "away", "today"]
    draw = np.random.default_rng(0)
    references = [" ".join(draw.choice(words, 8)) for _ in range(60)]
    worse = [" ".join(w if draw.random() < 0.8 else "it" for w in line.split()) for line in references]
    rows = [row("base", (0, 0)), row("caneft", (0, 0)), row("lora", (0, 0))]
    for of, lines in zip(rows, (worse, references, worse), strict=True):
        of.folders[0] = tmp_path / of.label
        for domain in ("it", "koran"):
            write_lines(of.folders[0] / "translations" / of.label / f"{domain}.en", lines)
            write_lines(of.folders[0] / "translations/reference" / f"{domain}.en", references)
    p = comparison.p_values(rows, "en")["bleu"]
    # sacreBLEU: how often a resample's difference, less its mean, is at least the real one; both counts + 1
    resamples = np.random.default_rng(1).integers(0, 60, (300, 60))
    gap = [abs(bleu(references, references, ids) - bleu(worse, references, ids)) for ids in resamples]
    real = abs(bleu(references, references, range(60)) - bleu(worse, references, range(60)))
    by_hand = (1 + sum(abs(g - np.mean(gap)) >= real for g in gap)) / 301
    assert p["caneft"]["it"] == pytest.approx(by_hand, abs=0.01)
    assert p["caneft"]["it"] < comparison.LEVEL
    assert p["lora"]["koran"] == 1.0  # the same lines as the base's
    assert comparison.p_values(rows[1:], "en") == {}


def test_two_scores_of_nothing_do_not_differ(tmp_path):
    """Without smoothing BLEU is 0 where no four words match, whatever the lines are; chrF tells them apart."""
    references = ["the cat sat on the mat today"] * 20
    rows = [row("base", (0, 0)), row("lora", (0, 0))]
    for of, line in zip(rows, ("the cat on mat sat the", "a dog ran far away at"), strict=True):
        of.folders[0] = tmp_path / of.label
        for domain in ("it", "koran"):
            write_lines(of.folders[0] / "translations" / of.label / f"{domain}.en", [line] * 20)
            write_lines(of.folders[0] / "translations/reference" / f"{domain}.en", references)
    unsmoothed, smoothed = (comparison.p_values(rows, "en", smooth) for smooth in ("none", "exp"))
    assert unsmoothed["bleu"]["lora"]["it"] == 1.0
    assert max(unsmoothed["chrf"]["lora"]["it"], smoothed["bleu"]["lora"]["it"]) < comparison.LEVEL


def bleu(lines, references, ids) -> float:
    return sacrebleu.corpus_bleu([lines[i] for i in ids], [[references[i] for i in ids]]).score


def test_rows_of_one_method_are_called_by_what_differs():
    assert compare.differing(["caneft_tiny", "caneft_no_mdcan_tiny"]) == ["caneft", "caneft_no_mdcan"]
    assert compare.differing(["lora_tiny", "lora_llama2"]) == ["lora_tiny", "lora_llama2"]
    entries = [
        compare.Entry(name, None, RunConfig(method=Caneft())) for name in ("caneft_tiny", "caneft_no_mdcan_tiny")
    ]
    assert [compare.title(entry, entries) for entry in entries] == ["CANEFT", "CANEFT no mdcan"]


def test_the_first_line_says_on_which_base():
    plain, quantised = RunConfig(), RunConfig(model=ModelConfig(quantize="nf4"))
    full = replace(quantised, evaluate=replace(quantised.evaluate, on="full"))
    assert compare.what(plain, 1).endswith("1 seed(s)")
    assert compare.what(quantised, 1).endswith("; trained on the base in nf4, measured on it")
    assert compare.what(full, 1).endswith("; trained on the base in nf4, measured in full precision")
    several = replace(plain, data=replace(plain.data, pairs=("de-en", "en-fr")))
    assert ", de-en en-fr, --data.budget" in compare.what(several, 2)
    assert ", de-en, --data.budget" in compare.what(plain, 2)


def test_the_page_warns_once_of_a_prompt_that_the_base_does_not_know():
    rows = [row("base", (10, 5)), row("caneft", (20, 5), (30, 7))]
    assert compare.new_prompt(rows) == []
    for run in (run for each in rows for run in each.runs):
        run["prompt"] = {"given": "short", "loss": 3.4, "plain": "Into {tgt}", "plain_loss": 3.0, "sentences": 32}
    (line,) = compare.new_prompt(rows)
    assert '"short" its loss on 32 sentences is 3.40 nats' in line


def test_a_follower_matches_the_nearest_leader_above_it():
    methods = {"a": Lape(), "b": Caneft(), "c": Lape(), "d": Rcn(), "e": Caneft(consensus=None), "f": Lape()}
    methods |= {"g": Caneft(neuron_ratio=0.1), "h": Full(), "i": Lape()}
    entries = [compare.Entry(name, None, RunConfig(method=method)) for name, method in methods.items()]
    leaders = {entry.label: compare.leader_of(entry, entries) for entry in entries}
    found = {name: leader.label for name, leader in leaders.items() if leader}
    assert found == {"a": "b", "c": "b", "f": "b", "i": "g"}
    assert compare.leader_of(entries[0], entries[:1]) is None


def test_each_follower_is_given_its_leaders_set(tmp_path, monkeypatch):
    """CANEFT at two ratios, and LAPE below each: leaders run first, and the table keeps the recipes' order."""
    methods = {"lape_0": Lape(), "caneft_1": Caneft(), "lape_1": Lape(), "caneft_5": Caneft(neuron_ratio=0.05)}
    methods |= {"lape_5": Lape(), "lape_own": Lape(match="own.safetensors")}
    entries = [compare.Entry(name, None, RunConfig(method=method)) for name, method in methods.items()]
    started: dict[tuple[str, int], str] = {}

    def run_one(config):
        started[Path(config.out).parent.name, config.seed] = getattr(config.method, "match", "")
        return {"method": config.method.kind}

    monkeypatch.setattr(compare, "run_one", run_one)
    monkeypatch.setattr(compare, "write", lambda *args: None)
    own = compare.CompareConfig((), out=tmp_path, seeds=(0, 3))
    assert [row.label for row in compare.compare(own, entries)] == list(methods)
    assert [name for name, seed in started if not seed][:2] == ["caneft_1", "caneft_5"]
    for seed in (0, 3):
        sets = {name: str(tmp_path / name / f"seed-{seed}" / "neurons.safetensors") for name in methods}
        wanted = {"lape_0": sets["caneft_1"], "lape_1": sets["caneft_1"], "lape_5": sets["caneft_5"]}
        wanted |= {"lape_own": "own.safetensors", "caneft_1": "", "caneft_5": ""}
        assert {name: match for (name, of), match in started.items() if of == seed} == wanted


def test_settings_share_what_earlier_runs_made(tmp_path):
    first, row = RunConfig(method=Caneft()), Row("caneft", "CANEFT", [], [])
    shared = {}
    one = compare.settings(first, tmp_path / "a", 0, row, shared)
    two = compare.settings(RunConfig(method=Lape()), tmp_path / "b", 0, row, shared, "set.safetensors")
    other = compare.settings(RunConfig(method=Lape()), tmp_path / "c", 1, row, shared)
    assert (one.score.reuse, two.score.reuse, other.score.reuse) == ("", str(tmp_path / "a"), "")
    assert (two.method.match, other.method.match) == ("set.safetensors", "")
    assert not one.evaluate.base


def test_budget():
    data = DataConfig(score_sentences=100, train_sentences=20)
    assert [RunConfig(method=m, data=data).train_sentences for m in (Caneft(), Lape(), Full())] == [20, 20, 100]
    data = DataConfig(score_sentences=100, train_sentences=20, budget="equal")
    assert [RunConfig(method=m, data=data).train_sentences for m in (Caneft(), Full())] == [20, 20]


def test_wrong_input_is_named(tmp_path):
    own = compare.CompareConfig((RECIPES / "base_tiny.py",) * 2)
    with pytest.raises(UserError, match="each once"):
        compare.plan(own, [])
    with pytest.raises(UserError, match="no such recipe"):
        compare.load_recipe(tmp_path / "x.py")
    (tmp_path / "x.py").write_text("CONFIG = 3\n")
    with pytest.raises(UserError, match="defines no CONFIG"):
        compare.load_recipe(tmp_path / "x.py")
    for name in ("no_such", "../models", "caneft_tiny.py"):
        with pytest.raises(UserError, match=f"{name}: no such recipe"):
            compare.load_recipe(Path(name))
    with pytest.raises(UserError, match="defines no CONFIG"):
        compare.load_recipe(Path("models"))
    with pytest.raises(UserError, match="--seeds"):
        compare.plan(compare.CompareConfig((RECIPES / "base_tiny.py",), seeds=(1, 1)), [])


def test_an_installed_recipe_goes_by_its_name(tmp_path, monkeypatch):
    """Where there is no such file; the row's label is the same."""
    monkeypatch.chdir(tmp_path)
    names = ("caneft_tiny", "lora_tiny")
    by_name = compare.plan(compare.CompareConfig(tuple(map(Path, names))), [])
    by_file = compare.plan(compare.CompareConfig(tuple(RECIPES / f"{name}.py" for name in names)), [])
    assert by_name == by_file
    assert [entry.label for entry in by_name] == list(names)
    (tmp_path / "caneft_tiny").write_text("CONFIG = None\n")  # the file comes first
    with pytest.raises(UserError, match="defines no CONFIG"):
        compare.load_recipe(Path("caneft_tiny"))


def test_a_comparison_as_a_program(tmp_path):
    """Two scoring methods share a pass, two seeds; given again it runs nothing anew."""
    small = ["--model.path", str(tiny.model_dir("test")), "--data.seen", "it", "law", "--data.score-sentences", "8"]
    small += ["--data.train-sentences", "6", "--data.dev-sentences", "4", "--data.test-sentences", "3"]
    small += ["--train.epochs", "1", "--train.report-to", "--evaluate.max-new-tokens", "8"]
    recipes = [str(RECIPES / f"{name}_tiny.py") for name in ("base", "lape", "caneft")]
    command = [sys.executable, "-m", "slicetune.engine", "compare", *recipes, "--seeds", "0", "1"]
    command += ["--out", str(tmp_path / "out"), *small, "--train.sweep", "1e-3", "1e-2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the scores of") == 2
    read = json.loads((tmp_path / "out/results.json").read_text())
    assert {label: len(entry["runs"]) for label, entry in read["rows"].items()} == {
        "base_tiny": 1,
        "lape_tiny": 2,
        "caneft_tiny": 2,
    }
    first, second = read["rows"]["caneft_tiny"]["runs"]
    assert (len(first["sweep"]), len(second["sweep"])) == (2, 1)
    assert first["learning_rate"] == second["learning_rate"]
    counts = [read["rows"][label]["runs"][0]["trainable_parameters"] for label in ("lape_tiny", "caneft_tiny")]
    assert abs(counts[0] - counts[1]) <= 3 * 64  # one FFN unit of the test model
    assert set(read["p_values"]["bleu"]["caneft_tiny"]) == {"it", "law", "koran"}
    assert "<h1>Comparison</h1>" in (tmp_path / "out/report.html").read_text()
    again = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") > 20
    assert "tokens" not in again.stderr
    assert json.loads((tmp_path / "out/results.json").read_text())["rows"] == read["rows"]
