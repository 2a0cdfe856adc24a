"""bench/study.py: plans are sound, the bootstrap is sacreBLEU's arithmetic, and a study goes on where it stopped."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from sacrebleu.metrics import BLEU
from studies import LINES, OTHERS, PLAN, finished

from slicetune.engine.common.errors import UserError
from slicetune.engine.run.cli import parse
from slicetune.engine.run.compare import load_recipe

BENCH = Path(__file__).parents[1] / "bench"
PLANS = sorted(file.stem for file in (BENCH / "studies").glob("*.toml"))


pytestmark = pytest.mark.usefixtures("bench")


@pytest.mark.parametrize("name", PLANS)
def test_every_row_of_a_plan_is_a_recipe_with_flags_that_it_has(name):
    from study_plan import read, words

    plan = read(name)
    assert plan.contrasts
    assert plan.parts
    for row in [*plan.rows, *(plan.rates.rows if plan.rates else ())]:
        config = parse(load_recipe(Path(row.recipe)), words(row.flags))
        assert {d for of in plan.parts.values() for d in of if "/" not in d} <= set(config.data.domains)


def test_the_rows_flags_count_more_than_the_jobs_and_the_studys(written):
    from study_plan import read

    plan = read(str(written))
    assert [row.flags["train.epochs"] for row in plan.rows] == [1, 3, 1]


def test_flags_become_words():
    from study_plan import words

    flags = {"data.seen": ["it", "law"], "train.report-to": [], "evaluate.base": False, "method.task-ratio": "None"}
    wanted = "--data.seen it law --train.report-to --evaluate.no-base --method.task-ratio None"
    assert words(flags) == wanted.split()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"base"]]', '"bass"]]', "contrasts name bass, which is no row"),
        ('rate = "full", ', 'rate = "fall", ', "rate names fall, which [rates.rows] has not"),
        ('after = "main"', 'after = "first"', "job second comes after first, which is no job before it"),
        ("full_second", "lora_second", "lora of job second: job main has no such row"),
        ("full_second", "full", "two rows are called full"),
        ("[parts]", "[pieces]", "not a study: parts is missing"),
        ("contrasts", "contrast", "contrast is no part of a study: it has title about"),
        ("seeds = [0, 1]", "seeds = [0, 1", "not a study: Unclosed array"),
        ("seeds = [0, 1]", "seeds = []", "seeds = []: must be whole numbers in []"),
        ("seeds = [0, 1]", 'seeds = "01"', "seeds = '01': must be whole numbers"),
        ('seen = ["it"]', 'seen = "it"', "parts.seen = 'it': must be domains in []"),
        ('["full", "base"]', '"full", "base"', "contrasts = ['full', 'base']: must be pairs of two rows"),
        ('recipe = "base_tiny"', "recipe = 3", "jobs.main.rows.base.recipe = 3: must be a name"),
        ('rate = "full", ', 'rates = "full", ', "'rates': must be recipe, rate or a flag in quotes"),
        ("base = {", '"a/base" = {', "'a/base': must be a name of letters"),
        ('"train.epochs" = 1', "train = { epochs = 1 }", "flags.train = {'epochs': 1}: must be a value"),
        ("[jobs.second", "[jobs.rates", "a study has a folder of its own that is called so"),
    ],
)
def test_a_plan_that_is_wrong_is_refused(written, old, new, said):
    from study_plan import read

    written.write_text(PLAN.replace(old, new))
    with pytest.raises(UserError, match=re.escape(said)):
        read(str(written))


def test_an_unknown_study_names_those_there_are():
    from study_plan import read

    with pytest.raises(UserError, match="capacity"):
        read("capazity")


@pytest.mark.parametrize("language", ["en", "zh"])
def test_bleu_of_summed_counts_is_sacrebleus(language):
    from study_bootstrap import bleu, sentence_counts

    counts = sentence_counts(OTHERS, LINES, language)
    for drawn in ([0, 1, 2, 3], [3, 3], [1], [0, 0, 3], [2, 2, 2]):
        metric = BLEU(tokenize="zh" if language == "zh" else "13a")
        wanted = metric.corpus_score([OTHERS[i] for i in drawn], [[LINES[i] for i in drawn]]).score
        assert bleu(counts[drawn].sum(0)) == pytest.approx(wanted, abs=1e-9)
    nothing = sentence_counts(["", "x"], ["the file", "he said so"], language)
    assert bleu(nothing.sum(0)) == BLEU().corpus_score(["", "x"], [["the file", "he said so"]]).score == 0


def test_a_difference_is_drawn_over_sentences_and_seeds():
    """Against a loop that draws the same sentences and seeds, and scores their lines with sacreBLEU."""
    from study_bootstrap import Bootstrap, sentence_counts

    systems = [[OTHERS, LINES[::-1]], [LINES, OTHERS]]  # two systems of two seeds
    boot = Bootstrap({"law": 4}, seeds=2, draws=40)
    a, b = (boot.scores([{"law": sentence_counts(lines, LINES, "en")} for lines in of]) for of in systems)
    got = boot.mean(a, ["law"]) - boot.mean(b, ["law"])
    for draw in range(41):
        drawn = np.repeat(np.arange(4), boot.weights["law"][draw])
        score = lambda lines: BLEU().corpus_score([lines[i] for i in drawn], [[LINES[i] for i in drawn]]).score  # noqa: B023, E731
        one, other = (np.mean([score(of[seed]) for seed in boot.seeds[draw]]) for of in systems)
        assert got[draw] == pytest.approx(one - other, abs=1e-9)
    found = boot.difference(a, b, ["law"])
    assert found.mean == got[0]
    assert found.low <= found.mean <= found.high


def test_what_does_not_differ_has_p_1_and_what_always_does_a_small_one():
    from study_bootstrap import Bootstrap, sentence_counts

    boot = Bootstrap({"law": 4}, seeds=3, draws=100)
    good, bad = (boot.scores([{"law": sentence_counts(lines, LINES, "en")}] * 3) for lines in (LINES, OTHERS[::-1]))
    assert boot.difference(good, good, ["law"]).p == 1
    assert boot.difference(good, bad, ["law"]).p == pytest.approx(2 / 101)
    base = boot.scores([{"law": sentence_counts(OTHERS, LINES, "en")}])  # a base has one seed, which stands for all
    assert boot.difference(good, base, ["law"]).mean > 0


def test_the_page_says_what_is_done_and_what_differs(tmp_path, written):
    from study import Study, publish
    from study_plan import read

    plan, prompt = read(str(written)), ["--data.prompt", "Into {tgt}."]
    study = Study(plan, tmp_path / "out", [], prompt, 1)
    assert not publish(study, "toy", tmp_path)  # nothing is finished
    finished(study.folder("rates", "full", 0), "full", LINES, 0.5)
    finished(study.folder("main", "base", 0), "base", OTHERS, None, *prompt)
    full = ("--train.epochs", "3", "--train.learning-rate", "0.001")
    for seed in (0, 1):
        finished(study.folder("main", "full", seed), "full", LINES, 0.5 + seed, *full, *prompt)
    assert publish(study, "toy", tmp_path)
    page = (tmp_path / "study-trial.md").read_text()
    command = "`python bench/study.py trial.toml MODEL DATA --data.prompt 'Into {tgt}.'`"
    assert f"**3 of 5 runs are done.** {command}" in page
    assert "| `full` | 2 | 7 | 0.001 | 1.0000 ± 0.7071 | 100.00 ± 0.00 (+" in page
    assert "- `full`: 0.001 → 0.5000" in page
    assert "`full` is better than `base` on seen." in page
    assert "the difference to the base" in page
    assert json.loads((tmp_path / "study-trial.json").read_text())["toy"]["contrasts"][0]["seeds"] == [0, 1]
    shutil.rmtree(study.folder("main", "full", 1))
    shutil.rmtree(study.folder("main", "base", 0))
    publish(study, "other", tmp_path)
    assert "the difference to the base" not in (tmp_path / "study-trial.md").read_text().split("## other")[1]
    both = json.loads((tmp_path / "study-trial.json").read_text())
    assert [both[model]["done"] for model in ("toy", "other")] == [3, 1]
    assert all(f"## {model}" in (tmp_path / "study-trial.md").read_text() for model in both)


def test_a_contrast_without_a_common_seed_is_left_out_and_a_dev_loss_that_is_no_number_too(tmp_path, written):
    from study import Study, publish
    from study_plan import read

    second = '[jobs.second]\nafter = "main"\n[jobs.second.rows]\nfull_second'
    plain = PLAN.replace(second, "lora").replace('["full", "base"]', '["full", "base"], ["lora", "full"]')
    written.write_text(plain.replace("full_tiny", "lora_tiny"))
    study = Study(read(str(written)), tmp_path / "out", [], [], 1)
    finished(study.folder("rates", "full", 0), "lora", LINES, 0.5)
    flags = ("--train.learning-rate", "0.001")
    finished(study.folder("main", "base", 0), "base", LINES, None)
    finished(study.folder("main", "full", 0), "lora", LINES, float("inf"), *flags, "--train.epochs", "3")
    finished(study.folder("main", "lora", 1), "lora", LINES, float("inf"), *flags, "--train.epochs", "1")
    publish(study, "toy", tmp_path)
    found = json.loads((tmp_path / "study-trial.json").read_text())["toy"]
    assert [(each["row"], each["against"]) for each in found["contrasts"]] == [("full", "base")]
    assert "| `full` | 1 | 7 | 0.001 |  | 100.00 (" in (tmp_path / "study-trial.md").read_text()


def test_the_page_says_where_a_sweep_has_not_found_the_end():
    from study_page import _edge, _tried

    assert _edge({"0.001": 2.0, "0.01": 1.0, "0.1": 3.0}) == ""
    assert _edge({"0.001": 2.0, "0.01": 1.0, "0.1": None}) == ""
    assert "no lower rate was tried" in _edge({"0.001": 1.0, "0.01": 2.0})
    assert _tried({"0.001": 1.0, "0.1": None}) == "0.001 → 1.0000, 0.1 → no number"


def test_rows_of_a_job_after_another_start_from_their_own_models(tmp_path, written, monkeypatch):
    """Which comparisons a study starts: the sweep first, then seed by seed; the rate is what the sweep found."""
    import study as program
    from study_plan import read

    started = []

    class Done:
        def __init__(self, command):
            started.append(" ".join(command[command.index("compare") + 1 :]))

        def wait(self):
            return 0

    monkeypatch.setattr(program.subprocess, "Popen", Done)
    study = program.Study(read(str(written)), tmp_path, ["--model.path", "tiny"], ["--train.max-steps", "2"], 1)
    finished(study.folder("rates", "full", 0), "full", LINES, 0.5)
    study.run()
    of = lambda job, *rows: " ".join(f"{tmp_path}/recipes/{job}/{row}.py" for row in rows)  # noqa: E731
    second = lambda seed: f"{of('second', 'full_second')} --out {tmp_path}/second --seeds {seed} --model.path "  # noqa: E731
    assert started == [
        f"{of('rates', 'full')} --out {tmp_path}/rates --seeds 0",
        f"{of('main', 'base', 'full')} --out {tmp_path}/main --seeds 0",
        f"{of('main', 'base', 'full')} --out {tmp_path}/main --seeds 0 1",
        f"{second(0)}{tmp_path}/main/full/seed-0/model",
        f"{second(1)}{tmp_path}/main/full/seed-1/model",
    ]
    config = load_recipe(tmp_path / "recipes/main/full.py")
    assert (config.train.learning_rate, config.train.epochs, config.train.max_steps) == (0.001, 3, 2)
    assert config.model.path == "tiny"


def test_the_test_bed_reads_what_it_is_taught_and_nothing_else(tmp_path):
    import gzip

    import testbed

    for domain in ("chat", "law"):
        folder = tmp_path / "de-en" / domain
        folder.mkdir(parents=True)
        with gzip.open(folder / "train.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({"translation": {"de": f"{domain} {i}", "en": f"{i}"}}) + "\n" for i in (1, 2))
    texts = testbed.taught(tmp_path, ["chat"])
    system = "<|bos|><|system|>Translate from German into English. Domain: chat."
    assert texts[0] == f"{system}<|user|>German: chat 1<|assistant|>English: 1<|eot|>"
    assert len(texts) == 2
    rows = [[i] * (30 if i % 2 else 50) for i in range(40)]
    plan = [row for batch in testbed.batches(rows, epochs=3) for row in batch]
    assert sorted(plan) == sorted(rows * 3 + rows[1::2])  # the short ones once more, first
    assert all(len(row) == 30 for row in plan[:20])


def test_the_plan_of_the_readme_is_one(tmp_path):
    from study_plan import read

    text = (BENCH / "README.md").read_text()
    (tmp_path / "mine.toml").write_text(text.partition("```toml\n")[2].partition("```")[0])
    assert [row.label for row in read(str(tmp_path / "mine.toml")).rows] == ["base", "caneft", "rcn"]


def test_a_file_that_would_overwrite_the_page_of_another_study_is_refused(tmp_path):
    from study_plan import read

    (tmp_path / "capacity.toml").write_text(PLAN)
    with pytest.raises(UserError, match="is a study of bench/studies, whose page this would overwrite: rename it"):
        read(str(tmp_path / "capacity.toml"))
    with pytest.raises(UserError, match=r"mine\.toml: no such file"):
        read(str(tmp_path / "mine.toml"))
