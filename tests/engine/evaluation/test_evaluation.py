"""Scores are those that the sacrebleu command prints, signatures included."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from slicetune.engine.common.errors import UserError
from slicetune.engine.data import languages
from slicetune.engine.evaluation.bleu import average, score_domain, score_system, tokenizer_name

ENGLISH = (
    ["The rash fades after two days.", "Open the attached file (see p. 3)!", "", "It costs 3,50 € , he said ."],
    ["The rash disappears after two days.", "Please open the attachment (see p. 3).", "Nothing.", "It costs €3.50."],
)
CHINESE = (["皮疹两天后消退。", "请打开附件。"], ["皮疹在两天后消失。", "请打开 the attachment。"])


def command(tmp_path, lines, *options):
    for name, text in zip(("hypothesis", "reference"), lines, strict=True):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in text), encoding="utf-8")
    line = [sys.executable, "-m", "sacrebleu", "reference", "-i", "hypothesis", "-m", "bleu", "chrf", "-w", "10"]
    done = subprocess.run([*line, *options], cwd=tmp_path, capture_output=True, text=True, check=True)
    return {row["name"]: row for row in json.loads(done.stdout)}


@pytest.mark.parametrize(
    ("lines", "language", "options"),
    [(ENGLISH, "en", ()), (CHINESE, "zh", ("-l", "en-zh")), (CHINESE, "zh_cn", ("--tokenize", "zh"))],
)
def test_scores_and_signatures_equal_the_command(tmp_path, lines, language, options):
    ours, theirs = score_domain(*lines, language), command(tmp_path, lines, *options)
    assert ours["bleu"] == pytest.approx(theirs["BLEU"]["score"], abs=1e-9)
    assert ours["chrf"] == pytest.approx(theirs["chrF2"]["score"], abs=1e-9)
    assert 0 < ours["bleu"] != ours["chrf"] > 0
    assert ours["bleu_signature"] == theirs["BLEU"]["signature"]
    assert ours["chrf_signature"] == theirs["chrF2"]["signature"]
    assert ours["n"] == len(lines[0])


def test_signature_is_the_papers(tmp_path):
    fields = dict(field.split(":") for field in score_domain(*ENGLISH, "en")["bleu_signature"].split("|"))
    assert {k: fields[k] for k in ("nrefs", "case", "tok", "smooth")} == {
        "nrefs": "1",
        "case": "mixed",
        "tok": "13a",
        "smooth": "exp",
    }


def test_japanese_takes_mecab_only_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert tokenizer_name("ja") == "char"
    assert "tok:char" in score_domain(["皮疹"], ["皮疹"], "ja")["bleu_signature"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert tokenizer_name("ja") == "ja-mecab"
    assert tokenizer_name("zha") == "13a"


@pytest.mark.parametrize(
    ("codes", "tokenizer"),
    [
        (("zh", "zh-TW", "zh_Hant", "zho", "zho_Hans", "cmn", "yue"), "zh"),
        (("th", "tha", "tha_Thai", "lo", "lao_Laoo", "km", "khm", "my", "mya", "bo", "bod", "dz", "dzo"), "char"),
        (("de", "deu", "en_US", "ko", "kor_Hang", "vi", "ar", "hi"), "13a"),
    ],
)
def test_characters_are_counted_where_words_are_not_set_apart(codes, tokenizer):
    for code in codes:
        assert tokenizer_name(code) == tokenizer
        languages.language(code)  # prompts can name it


def test_thai_has_a_score_of_characters_and_one_of_words():
    scores = score_domain(["แมวนั่งบนเสื่อสีแดง"], ["แมวนั่งบนเสื่อสีดำ"], "th")
    assert scores["bleu"] > 60
    assert scores["bleu_13a"] == 0
    assert "tok:char" in scores["bleu_signature"]
    assert "tok:13a" in scores["bleu_13a_signature"]


def test_averages_are_unweighted_over_domains():
    scores = {
        "it": {"bleu": 10.0, "chrf": 40.0, "n": 1000},
        "law": {"bleu": 40.0, "chrf": 50.0, "n": 1},
        "koran": {"bleu": 1.0, "chrf": 15.0, "n": 10},
    }
    assert average(scores, ["it", "law"], ["koran"]) == {
        "seen": {"bleu": 25.0, "chrf": 45.0},
        "unseen": {"bleu": 1.0, "chrf": 15.0},
        "all": {"bleu": 17.0, "chrf": 35.0},
    }
    assert "unseen" not in average(scores, ["it", "law"], [])


def test_a_system_is_its_domains_and_their_averages():
    lines = {"it": (["a b c d"], ["a b c d"]), "koran": (["a b c d"], ["e f g h"])}
    hypotheses, references = ({d: both[side] for d, both in lines.items()} for side in (0, 1))
    system = score_system(hypotheses, references, dict.fromkeys(lines, "en"), ["it"], ["koran"])
    assert system["domains"]["it"]["bleu"] == pytest.approx(100)
    assert system["domains"]["it"]["signatures"]["bleu"].startswith("nrefs:1|")
    assert system["averages"]["all"]["bleu"] == pytest.approx(50 + system["domains"]["koran"]["bleu"] / 2)
    assert set(system["domains"]["koran"]) == {"bleu", "chrf", "signatures", "n"}


def test_unaligned_and_empty_files_are_refused():
    with pytest.raises(UserError, match="2 translations for 1 references"):
        score_domain(["a", "b"], ["a"], "en")
    with pytest.raises(UserError, match="no test sentence"):
        score_domain([], [], "en")
