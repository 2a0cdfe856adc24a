"""Tables as corpora (tsv, csv, parquet), other records of JSON, and what is said of layouts that are only near."""

from __future__ import annotations

import json

import datasets
import pytest

from slicetune.engine.common.errors import UserError
from slicetune.engine.data import corpus
from slicetune.engine.data.config import DataConfig

WANTED = [('Hallo "Welt"', 'Hello, "world"'), ("NA", "null"), ("12", "1.50")]


def config(root, **settings) -> DataConfig:
    given = {"seen": ("it",), "unseen": (), "dev_sentences": 0} | settings
    return DataConfig(dir=str(root), **given)


def read(root, pair: str = "de-en") -> list[tuple[str, str]]:
    return [(pair.source, pair.target) for pair in corpus.load_domain(config(root, pair=pair), "it", "test")]


def rows(*names: str) -> list[dict[str, str]]:
    return [dict(zip(names, sides, strict=True)) for sides in WANTED]


def folder(tmp_path):
    (made := tmp_path / "de-en" / "it").mkdir(parents=True)
    return made


@pytest.mark.parametrize("header", ["", "source\ttarget\n", "en\tde\n"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tsv(tmp_path, header, end):
    lines = [f"{en}\t{de}" if header.startswith("en") else f"{de}\t{en}" for de, en in WANTED]
    (folder(tmp_path) / "test.tsv").write_bytes((header + end.join(lines)).encode())
    assert read(tmp_path) == WANTED
    assert read(tmp_path, "en-de") == [(en, de) for de, en in WANTED]


def test_a_broken_line_of_a_tsv_costs_one_record(tmp_path):
    (folder(tmp_path) / "test.tsv").write_bytes(b"a\tb\nc\n\xff\td\n" + b"e\tf\n" * 5)
    pairs, faults = corpus._read(config(tmp_path, max_dropped=0.5), "it", "test")
    assert [pair.index for pair in pairs] == [1, 4, 5, 6, 7, 8]
    assert faults.dropped == {"not 2 columns": 1, "invalid UTF-8": 1}
    assert "test.tsv:2" in faults.describe(faults.dropped)


@pytest.mark.parametrize("names", [("source", "target"), ("de", "en")])
@pytest.mark.parametrize("name", ["test.parquet", "test-00000-of-00001.parquet", "test.csv"])
def test_csv_and_parquet(tmp_path, name, names):
    table = datasets.Dataset.from_list(rows(*names))
    path = str(folder(tmp_path) / name)
    table.to_csv(path) if name.endswith("csv") else table.to_parquet(path)
    assert read(tmp_path) == WANTED
    assert read(tmp_path, "en-de") == [(en, de) for de, en in WANTED]


def test_a_csv_without_a_line_of_names_says_which_columns_it_lacks(tmp_path):
    (folder(tmp_path) / "test.csv").write_text("Das Haus,The house\n" * 3)
    with pytest.raises(UserError, match=r'2 no key or column "de", "source" or "translation" \(first: .*test\.csv:1\)'):
        read(tmp_path)


def test_a_parquet_as_the_hub_has_it_and_a_damaged_one(tmp_path):
    path = folder(tmp_path) / "test.parquet"
    datasets.Dataset.from_list([{"translation": row} for row in rows("de", "en")]).to_parquet(str(path))
    assert read(tmp_path) == WANTED
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=r"test\.parquet: cannot be read"):
        read(tmp_path)


@pytest.mark.parametrize("names", [("source", "target"), ("de", "en")])
def test_json_records_without_the_word_translation(tmp_path, names):
    lines = "".join(json.dumps(row) + "\n" for row in rows(*names))
    (folder(tmp_path) / "test.jsonl").write_text(lines)
    assert read(tmp_path) == WANTED
    assert read(tmp_path, "en-de") == [(en, de) for de, en in WANTED]


NEAR = [
    (["it/train.jsonl"], "de-en", r"/it is there: move the domains' folders into .*/de-en"),
    (["EMEA.de-en.de", "EMEA.de-en.en"], "de-en", r"EMEA\.de-en\.de there is OPUS's \(Moses\).*de-en/it/<split>\.de"),
    (["Bi-Education.txt", "Bi-Laws.txt"], "en-zh", r"Bi-Education\.txt there is UM-Corpus's.*en-zh/it/<split>\.en"),
    (["de-en/it/train.txt"], "de-en", r"files there: train\.txt"),
    (["de-en/it/validation.jsonl", "de-en/it/train.arrow"], "de-en", r"files there: train\.arrow validation\.jsonl"),
    (["de-en/law/train.jsonl"], "de-en", "domains there: 'law'"),
    (["corpus.xml"], "de-en", r"files there: corpus\.xml"),
    ([], "de-en", "no such folder"),
]


@pytest.mark.parametrize(("files", "pair", "words"), NEAR)
def test_what_lies_there_is_said(tmp_path, files, pair, words):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=rf"no train split of 'it': {pair}/it/train\.jsonl.*{words}"):
        corpus.load_domain(config(tmp_path, pair=pair), "it", "train")
