"""Several directions in one run: which domains each has, whose sentences they are, and how results name them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from toys import bytes_tokenizer, model_of_bytes

from slicetune.engine.common.errors import UserError
from slicetune.engine.common.files import write_lines
from slicetune.engine.data import corpus, prompts
from slicetune.engine.data.config import DataConfig
from slicetune.engine.data.examples import encode_pairs
from slicetune.engine.data.records import Pair
from slicetune.engine.evaluation import results
from slicetune.engine.evaluation.report import sections
from slicetune.engine.evaluation.report.run import table, write_report
from slicetune.engine.evaluation.translation import Line, Translated, translate
from slicetune.engine.models.shapes import resolve
from slicetune.engine.run.config import RunConfig
from slicetune.engine.run.forecast import memory
from slicetune.engine.run.forecast.estimate import corpus_of

PAIRS = ("de-en", "en-de", "fr-en")
PROMPT = prompts.Prompt(system="{src} to {tgt}. {domain}.")


def write(path, *rows: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"translation": row}) + "\n" for row in rows))


def data_of(root, **kwargs) -> DataConfig:
    settings = {"pairs": PAIRS, "seen": ("it", "law"), "unseen": ("koran",), "score_sentences": 2, "dev_sentences": 1}
    return DataConfig(dir=str(root), **{**settings, **kwargs})


@pytest.fixture
def root(tmp_path):
    """German has both seen domains, French `it` alone, and `law` without a train split."""
    for pair, code, domains in (("de-en", "de", ("it", "law", "koran")), ("en-fr", "fr", ("it",))):
        for domain in domains:
            for split in ("train", "dev", "test"):
                rows = ({c: f"{c} {domain} {split} {i}" for c in (code, "en")} for i in range(3))
                write(tmp_path / pair / domain / f"{split}.jsonl", *rows)
    write(tmp_path / "en-fr/law/test.jsonl", {"fr": "a", "en": "b"})
    return tmp_path


def test_a_direction_has_the_domains_that_the_corpus_has_of_it(root):
    found = corpus.directions(data_of(root))
    assert [(d.pair, d.seen, d.unseen) for d in found] == [
        ("de-en", ("it", "law"), ("koran",)),
        ("en-de", ("it", "law"), ("koran",)),
        ("fr-en", ("it",), ()),
    ]
    assert all(d.groups == d.pairs == PAIRS for d in found)
    report = corpus.check(data_of(root))
    assert "fr-en goes without 'law' 'koran'" in str(report)
    assert {(s.domain, s.name) for s in report.splits if s.domain.startswith("fr-en")} == {
        ("fr-en/it", split) for split in ("train", "dev", "test")
    }
    assert "scored sentences ('de-en' 4, 'en-de' 4, 'fr-en' 2): a direction with fewer weighs less" in str(report)
    many = corpus.check(data_of(root, score_sentences=4)).notes
    assert [note for note in many if "fewer than" in note] == [
        "de-en/it/train has 3 sentences, de-en/law/train has 3 sentences, en-de/it/train has 3 sentences, "
        "en-de/law/train has 3 sentences, fr-en/it/train has 3 sentences, fewer than --data.score-sentences 4"
    ]
    alone = data_of(root, pairs=())
    assert corpus.directions(alone) == [alone]
    assert alone.groups == ("it", "law")


def test_a_dry_run_counts_every_direction(root):
    found = corpus_of(RunConfig(data=data_of(root, score_sentences=9, train_sentences=2)))
    assert found.scored == {"de-en/it": 3, "de-en/law": 3, "en-de/it": 3, "en-de/law": 3, "fr-en/it": 3}
    assert found.trained == dict.fromkeys(found.scored, 2)
    assumed = corpus_of(RunConfig(data=data_of("tiny", pairs=PAIRS[:2], train_sentences=2)))
    assert assumed.trained == dict.fromkeys(("de-en/it", "de-en/law", "en-de/it", "en-de/law"), 2)
    shape = resolve("tiny-pairs")
    directions, domains = (RunConfig(data=data_of(root, pairs=pairs)) for pairs in (PAIRS, ()))
    assert 2 * memory.counts_bytes(directions, shape) == 3 * memory.counts_bytes(domains, shape)


def test_a_direction_reads_a_folder_the_other_way_round(root):
    there, back, french = (corpus.load_domain(d, "it", "train", 2, seed=1) for d in corpus.directions(data_of(root)))
    assert [(p.source, p.target, p.languages) for p in back] == [(p.target, p.source, ("en", "de")) for p in there]
    assert french[0].languages == ("fr", "en")
    assert french[0].source.startswith("fr it train")


def test_domains_and_directions_that_are_not_there_are_refused(root):
    with pytest.raises(UserError, match=r"no direction of --data\.pairs has 'medical'"):
        corpus.directions(data_of(root, seen=("it", "medical")))
    with pytest.raises(
        UserError, match=r"--data\.pairs fr-en it-en: .* has no domain of --data\.seen in that direction"
    ):
        corpus.directions(data_of(root, pairs=(*PAIRS, "it-en"), seen=("law",)))
    with pytest.raises(UserError, match=r"no direction of --data\.pairs has 'koran'"):
        corpus.check(data_of(root, pairs=("fr-en",), seen=("it",)))
    with pytest.raises(UserError, match=r"--data\.pairs 'deen': write source-target"):
        DataConfig(pairs=("deen",))
    with pytest.raises(UserError, match="names de-en more than once"):
        DataConfig(pairs=("de-en", "en-de", "de-en"))


def test_directions_of_a_hub_set_that_has_a_configuration_for_each(monkeypatch, tmp_path):
    """OPUS-100's way: `en-fr` serves fr-en too; a direction without one is refused before anything is read."""
    import datasets

    asked = []

    def load(path, name, split):
        asked.append((name, split))
        codes = name.split("-")
        return datasets.Dataset.from_list([{"translation": {code: f"{code} {i}" for code in codes}} for i in range(2)])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda path: ["de-en", "en-fr"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    data = data_of("someone/opus", seen=("opus",), unseen=(), score_sentences=1)
    found = [corpus.load_domain(d, "opus", "test")[0] for d in corpus.directions(data)]
    assert [(p.source, p.target) for p in found] == [("de 0", "en 0"), ("en 0", "de 0"), ("fr 0", "en 0")]
    assert asked == [("de-en", "test"), ("de-en", "test"), ("en-fr", "test")]
    with pytest.raises(UserError, match=r"--data\.pairs zh-en: someone/opus has no domain of --data\.seen"):
        corpus.directions(data_of("someone/opus", pairs=("de-en", "zh-en"), seen=("opus",), unseen=()))


def test_fingerprints(root):
    one = corpus.check(data_of(root, pairs=())).fingerprint
    assert one == corpus.check(data_of(root, pairs=(), pair="de-en")).fingerprint
    assert len({one, *(corpus.check(data_of(root, pairs=p)).fingerprint for p in (PAIRS, PAIRS[:2], PAIRS[1:]))}) == 4
    before = corpus.check(data_of(root)).fingerprint
    write(root / "en-fr/it/train.jsonl", {"fr": "x", "en": "y"})
    assert corpus.check(data_of(root)).fingerprint != before
    assert corpus.check(data_of(root, pairs=PAIRS[:2])).fingerprint != before


def test_leaks_are_looked_for_direction_by_direction(root):
    """A test sentence that the reverse direction trains on has its source in this direction's training text too."""
    known, half = {"de": "de law train 1", "en": "en law train 1"}, {"de": "neu", "en": "en it train 0"}
    write(root / "de-en/it/test.jsonl", known, half)
    found = {leak.domain: (leak.source, leak.both) for leak in corpus.check(data_of(root)).leaks}
    assert found == {"de-en/it": (1, 1), "en-de/it": (2, 1)}


def test_groups_are_directions(root):
    tokenizer, made = bytes_tokenizer(True), []
    for d in corpus.directions(data_of(root, prompt="short")):
        for domain in d.seen:
            made += encode_pairs(tokenizer, d, corpus.load_domain(d, domain, "train", 1), d.groups, "train", 900)[0]
    assert [(e.group, e.uid.rpartition("/")[0]) for e in made] == [
        (0, "de-en/it/train"),
        (0, "de-en/law/train"),
        (1, "en-de/it/train"),
        (1, "en-de/law/train"),
        (2, "fr-en/it/train"),
    ]
    assert "from French into English" in tokenizer.decode(made[-1].input_ids)


@pytest.mark.parametrize("batch_size", [2, 5])
def test_a_batch_mixes_directions(batch_size):
    model, tokenizer = model_of_bytes("llama"), bytes_tokenizer(False)
    pairs = [
        Pair("Ja.", "Yes.", "it", 1, ("de", "en")),
        Pair("The rash fades.", "Der Ausschlag verschwindet.", "it", 2, ("en", "de")),
        Pair("Oui.", "Yes.", "it", 3, ("fr", "en")),
        Pair("No.", "Nein.", "it", 4, ("en", "de")),
        Pair("Non, merci beaucoup.", "No, thank you.", "it", 5, ("fr", "en")),
    ]
    alone = [translate(model, tokenizer, PROMPT, [pair], 1, 12)[0] for pair in pairs]
    done = []
    made = translate(model, tokenizer, PROMPT, pairs, batch_size, 12, after_batch=lambda *at: done.append(at))
    assert made == alone
    assert done == [(n, -(-5 // batch_size)) for n in range(1, len(done) + 1)]


def test_results_files_and_tables_go_by_direction(tmp_path):
    directions = [
        replace(DataConfig(pairs=("de-en", "en-zh"), seen=("it",), unseen=("koran",)), pair=pair, unseen=unseen)
        for pair, unseen in (("de-en", ("koran",)), ("en-zh", ()))
    ]
    tests = {
        "de-en/it": [Pair("Das ist gut so.", "This is a good thing.", "it", 1, ("de", "en"))],
        "de-en/koran": [Pair("Er ist gut.", "He is so very good.", "koran", 1, ("de", "en"))],
        "en-zh/it": [Pair("Two days later.", "皮疹两天后消退。", "it", 1, ("en", "zh"))],
    }
    results.write_sides(tmp_path, tests)
    for name, pairs in tests.items():
        write_lines(results.translations(tmp_path, "base", name, pairs[0].languages[1]), [p.target for p in pairs])
    assert (tmp_path / "translations/source/en-zh/it.en").read_text() == "Two days later.\n"
    assert (tmp_path / "translations/reference/de-en/koran.en").read_text() == "He is so very good.\n"
    found = results.scores(tmp_path, directions, ["base"], tests, "none")
    assert (found["seen"], found["unseen"]) == (["de-en/it", "en-zh/it"], ["de-en/koran"])
    assert found["pairs"] == {"de-en": ["de-en/it", "de-en/koran"], "en-zh": ["en-zh/it"]}
    base = found["systems"]["base"]
    assert "bleu_13a" not in base["domains"]["de-en/it"]
    chinese = base["domains"]["en-zh/it"]
    assert ["tok:zh" in chinese["signatures"]["bleu"], "tok:13a" in chinese["signatures"]["bleu_13a"]] == [True, True]
    assert all("smooth:none" in s for key, s in chinese["signatures"].items() if key.startswith("bleu"))
    assert chinese["bleu"] == pytest.approx(100)
    assert chinese["bleu_13a"] == 0  # one token: no 4-gram
    assert base["pairs"]["en-zh"] == {key: chinese[key] for key in ("bleu", "chrf", "bleu_13a")}
    assert base["averages"]["all"]["bleu_13a"] == pytest.approx(200 / 3)
    lines = table(found | {"trainable_parameters": 0}).splitlines()
    rows = {line[:20].strip(): line.split()[-2:] for line in lines if line[:1].isalpha() and "." in line}
    assert list(rows)[:5] == ["de-en IT", "de-en Koran", "de-en, mean", "en-zh IT", "en-zh IT, tok 13a"]
    assert rows["en-zh IT, tok 13a"] == ["0.00", "100.00"]
    assert rows["all, mean"][0] == "100.00"
    assert sections.domain_name("de-en/tatoeba") == "de-en everyday"
    (tmp_path / "results.json").write_text(json.dumps(found | {"trainable_parameters": 0, "method": "base"}))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Base on 1 domain (IT) of 2 directions. No weight was trained.<" in page
    assert "tok:13a" in page  # the signature of the Chinese row's second BLEU
    assert "<td>en-zh IT, tok 13a</td>" in page


def test_smoothing_is_sacrebleus():
    from sacrebleu.metrics import BLEU

    from slicetune.engine.evaluation.bleu import score_domain

    lines = ["the cat sat"], ["the cat sat down today"]
    for smooth in ("exp", "none"):
        own = BLEU(smooth_method=smooth, tokenize="13a").corpus_score(lines[0], [lines[1]]).score
        assert score_domain(*lines, "en", smooth)["bleu"] == own


def test_some_directions_are_trained(root):
    data = data_of(root, train_pairs=("en-de",))
    counts = corpus_of(RunConfig(data=data))
    assert list(counts.scored) == ["de-en/it", "de-en/law", "en-de/it", "en-de/law", "fr-en/it"]
    assert list(counts.trained) == ["en-de/it", "en-de/law"]
    with pytest.raises(UserError, match=r"--data\.train-pairs it-en: not in --data\.pairs de-en en-de fr-en"):
        data_of(root, train_pairs=("it-en",))


def test_finished_translations_go_by_direction(tmp_path):
    """Two directions have files of one name; each is kept and found for itself."""
    finished = Translated(tmp_path / "base", {"settings": 1})
    finished.write("de-en/it.en", [Line("one", False)])
    assert finished.has("de-en/it.en")
    assert not finished.has("fr-en/it.en")
    assert (tmp_path / "base/de-en/it.en").read_text() == "one\n"
