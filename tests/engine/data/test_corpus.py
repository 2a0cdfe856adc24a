"""The four layouts, the seeded draw, and every kind of broken file (real ones, on disk)."""

import gzip
import json

import pytest

from slicetune.engine.common.errors import UserError
from slicetune.engine.data import corpus, layouts, records
from slicetune.engine.data.config import DataConfig
from slicetune.engine.data.records import Pair


def record(de, en):
    return json.dumps({"translation": {"de": de, "en": en}}, ensure_ascii=False) + "\n"


def lines(count, tag="s"):
    return [(f"{tag} Satz {i}", f"{tag} sentence {i}") for i in range(1, count + 1)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def config(root, **kwargs):
    defaults = {"seen": ("it",), "unseen": (), "score_sentences": 1, "train_sentences": 1, "dev_sentences": 0}
    return DataConfig(dir=str(root), **{**defaults, **kwargs})


def sides(pairs):
    return [(pair.source, pair.target) for pair in pairs]


WANTED = [("Hallo Welt", "Hello world"), ("Die Anlage", "The annex"), ("Ja", "Yes")]
JSONL = "".join(record(*pair) for pair in WANTED)
DE, EN = ("".join(f"{pair[side]}\n" for pair in WANTED) for side in (0, 1))
PUBLISHED = "".join(record(f"{de}\n", f"{en}\n") for de, en in WANTED)
INSTRUCT = json.dumps(
    [{"instruction": "Translate.", "input": f"German: {de}", "output": f"English: {en}"} for de, en in WANTED], indent=4
)
INSTRUCT_LINES = "".join(json.dumps(r) + "\n" for r in json.loads(INSTRUCT))


@pytest.mark.parametrize(
    "files",
    [
        {"de-en/medical/test.jsonl": JSONL},
        {"de-en/medical/test.jsonl.gz": JSONL},
        {"en-de/medical/test.jsonl": JSONL},
        {"de-en/medical/test.de": DE, "de-en/medical/test.en": EN},
        {"en-de/medical/test.de.gz": DE, "en-de/medical/test.en": EN.rstrip("\n")},
        {"de-en/medical/test.json": INSTRUCT},
        {"de-en/medical/test.jsonl": INSTRUCT_LINES},
        {"med.test.de-en.instruct.json": INSTRUCT},
        {"data/med.test.de-en.instruct.json": INSTRUCT},
        {"data/shuf.med.test.de-en.jsonl": PUBLISHED},
        {"med.test.de-en.jsonl.gz": PUBLISHED},
    ],
    ids=lambda files: " ".join(files),
)
@pytest.mark.parametrize("pair", ["de-en", "en-de"])
def test_layouts(tmp_path, files, pair):
    for name, content in files.items():
        write(tmp_path / name, content)
    pairs = corpus.load_domain(config(tmp_path, pair=pair), "medical", "test")
    assert sides(pairs) == (WANTED if pair == "de-en" else [(en, de) for de, en in WANTED])
    assert [(p.domain, p.index) for p in pairs] == [("medical", 1), ("medical", 2), ("medical", 3)]


def test_a_corpus_without_test_files_is_measured_on_dev_or_on_another_folders(tmp_path):
    """Train and dev records as one publisher has them, the other's test files as instruction records."""
    for domain in ("it", "koran"):
        write(tmp_path / f"a/de-en/{domain}/train.jsonl.gz", "".join(record(*pair) for pair in lines(9)))
        write(tmp_path / f"a/de-en/{domain}/dev.jsonl.gz", JSONL)
        write(tmp_path / f"b/{domain}.test.de-en.instruct.json", INSTRUCT)
    settings = {"unseen": ("koran",), "dev_sentences": 2}
    with pytest.raises(UserError, match=r"no test split of 'it'.*--data\.test-split dev and --data\.test-dir"):
        corpus.check(config(tmp_path / "a", **settings))
    on_dev = corpus.check(config(tmp_path / "a", test_split="dev", **settings))
    found = {(s.domain, s.name): s.sentences for s in on_dev.splits}
    assert found == {("it", "train"): 9, ("it", "dev"): 3, ("it", "test"): 3, ("koran", "test"): 3}
    assert "dev split, which chooses the checkpoint" in str(on_dev)
    elsewhere = config(tmp_path / "a", test_dir=str(tmp_path / "b"), **settings)
    assert sides(corpus.load_domain(elsewhere, "koran", "test")) == WANTED
    assert sides(corpus.load_domain(elsewhere, "it", "dev")) == WANTED
    assert corpus.check(elsewhere).fingerprint == on_dev.fingerprint  # what is trained is the same
    with pytest.raises(UserError, match=r"--data.test-dir .*nowhere: no such folder"):
        corpus.load_domain(config(tmp_path / "a", test_dir=str(tmp_path / "nowhere")), "it", "test")
    with pytest.raises(UserError, match=r"--data.test-dir .*: no test split of 'law'"):
        corpus.load_domain(config(tmp_path / "a", test_dir=str(tmp_path / "b")), "law", "test")


def test_the_pairs_own_folder_comes_first(tmp_path):
    write(tmp_path / "en-de/it/test.jsonl", record("falsch", "wrong"))
    write(tmp_path / "de-en/it/test.jsonl", record("richtig", "right"))
    assert sides(corpus.load_domain(config(tmp_path), "it", "test")) == [("richtig", "right")]


def test_tiny(tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, "corpus_dir", lambda: tmp_path)
    write(tmp_path / "de-en/it/test.jsonl", JSONL)
    assert sides(corpus.load_domain(config("tiny"), "it", "test")) == WANTED


# ---------------------------------------------------------------- the draw


def test_a_smaller_draw_is_a_prefix_of_a_larger(tmp_path):
    write(tmp_path / "de-en/it/train.jsonl", "".join(record(*pair) for pair in lines(50)))
    data = config(tmp_path)
    whole = corpus.load_domain(data, "it", "train", seed=3)
    assert sorted(p.index for p in whole) == list(range(1, 51))
    assert [p.index for p in whole] != list(range(1, 51))
    for limit in (1, 7, 30):
        assert corpus.load_domain(data, "it", "train", limit, 3) == whole[:limit]
    assert corpus.load_domain(data, "it", "train", 80, 3) == whole
    assert corpus.load_domain(data, "it", "train", 10, 4) != whole[:10]


def test_dev_and_test_keep_the_files_order(tmp_path):
    write(tmp_path / "de-en/it/dev.jsonl", JSONL)
    assert sides(corpus.load_domain(config(tmp_path), "it", "dev", 2, seed=5)) == WANTED[:2]


def test_a_broken_record_does_not_change_the_draw(tmp_path):
    rows = [record(*pair) for pair in lines(200)]
    file = write(tmp_path / "de-en/it/train.jsonl", "".join(rows))
    before = [p.index for p in corpus.load_domain(config(tmp_path), "it", "train", seed=1)]
    write(file, "".join([*rows[:9], record("", "x"), *rows[10:]]))
    after = [p.index for p in corpus.load_domain(config(tmp_path), "it", "train", seed=1)]
    assert after == [i for i in before if i != 10]


# ---------------------------------------------------------------- broken records

GOOD = [record(*pair).encode() for pair in lines(199)]
BROKEN = {
    "empty side": record("  \\t", "x").replace("\\\\t", "\\t").encode(),
    "longer than 1 MB": record("a" * 1_000_001, "x").encode(),
    "invalid UTF-8": b'{"translation": {"de": "\xff\xfe", "en": "x"}}\n',
    "NUL character": record("a\0b", "x").encode(),
    "invalid Unicode": b'{"translation": {"de": "\\ud800", "en": "x"}}\n',
    'no key "de"': b'{"translation": {"fr": "a", "en": "x"}}\n',
    'no key or column "de", "source" or "translation"': b'{"text": "a", "label": "x"}\n',
    '"translation" is not an object': b'{"translation": "a"}\n',
    "de is not text": b'{"translation": {"de": ["a"], "en": "x"}}\n',
    "en is not text": b'{"translation": {"de": "a", "en": null}}\n',
    "not a JSON object": b"17\n",
    "not JSON": b'{"translation": {"de": "a", \n',
}


@pytest.mark.parametrize("reason", BROKEN)
def test_broken_records_are_dropped_and_named(tmp_path, reason):
    file = write(tmp_path / "de-en/it/train.jsonl", b"".join([*GOOD[:40], BROKEN[reason], *GOOD[40:]]))
    write(tmp_path / "de-en/it/test.jsonl", JSONL)
    report = corpus.check(config(tmp_path))
    faults = report.splits[0].faults
    assert faults.dropped == {reason: 1}
    assert faults.first == {reason: f"{file}:41"}
    assert (faults.records, report.splits[0].sentences) == (200, 199)
    assert f"it/train: dropped 1 {reason} (first: {file}:41), of 200" in str(report)
    pairs = corpus.load_domain(config(tmp_path), "it", "train")
    assert sorted(p.index for p in pairs) == [i for i in range(1, 201) if i != 41]


@pytest.mark.parametrize("reason", BROKEN)
def test_too_many_broken_records_are_an_error(tmp_path, reason):
    file = write(tmp_path / "de-en/it/train.jsonl", b"".join([*GOOD[:40], *[BROKEN[reason]] * 3, *GOOD[40:]]))
    with pytest.raises(UserError) as error:
        corpus.load_domain(config(tmp_path), "it", "train")
    message = str(error.value)
    assert message.startswith(f"3 {reason} (first: {file}:41): 3 of 202 records are broken")
    assert "\n" not in message
    assert len(corpus.load_domain(config(tmp_path, max_dropped=0.02), "it", "train")) == 199


def test_a_megabyte_in_an_array(tmp_path):
    rows = [{"translation": {"de": de, "en": en}} for de, en in [*lines(99), ("a" * 1_000_001, "x")]]
    write(tmp_path / "de-en/it/test.json", json.dumps(rows))
    pairs, faults = corpus._read(config(tmp_path), "it", "test")
    assert (len(pairs), faults.dropped) == (99, {"longer than 1 MB": 1})


def test_exactly_the_tolerated_share_is_tolerated(tmp_path):
    write(tmp_path / "de-en/it/train.jsonl", b"".join([*GOOD[:99], BROKEN["NUL character"]]))
    assert len(corpus.load_domain(config(tmp_path), "it", "train")) == 99
    write(tmp_path / "de-en/it/train.jsonl", b"".join([*GOOD[:98], BROKEN["NUL character"]]))
    with pytest.raises(UserError, match="1 of 99 records"):
        corpus.load_domain(config(tmp_path), "it", "train")


def test_line_aligned_faults(tmp_path):
    source = [f"Satz {i}".encode() for i in range(1, 401)]
    target = [f"sentence {i}".encode() for i in range(1, 401)]
    source[9], target[19], source[29], target[39] = b"", b"\xc3", b"a\0b", b"c" * 3_000_000
    source[49] = "a\u2028b\x0bc\x85d".encode()  # no line ends: only LF is one
    write(tmp_path / "de-en/it/test.de", b"\n".join(source) + b"\n")
    write(tmp_path / "de-en/it/test.en", b"\n".join(target) + b"\n")
    data = config(tmp_path, max_dropped=0.05)
    pairs = corpus.load_domain(data, "it", "test")
    assert [p.index for p in pairs] == [i for i in range(1, 401) if i not in (10, 20, 30, 40)]
    assert all(p.target == f"sentence {p.index}" for p in pairs)
    _, faults = corpus._read(data, "it", "test")
    folder = tmp_path / "de-en/it"
    assert faults.first == {
        "empty side": f"{folder}/test.de:10",
        "invalid UTF-8": f"{folder}/test.en:20",
        "NUL character": f"{folder}/test.de:30",
        "longer than 1 MB": f"{folder}/test.en:40",
    }


def test_crlf_and_byte_order_mark_are_repaired(tmp_path):
    write(tmp_path / "de-en/it/test.de", b"\xef\xbb\xbf" + DE.replace("\n", "\r\n").encode())
    write(tmp_path / "de-en/it/test.en", EN)
    pairs, faults = corpus._read(config(tmp_path), "it", "test")
    assert sides(pairs) == WANTED
    assert faults.repaired == {"CRLF line ends": 3}
    write(tmp_path / "de-en/law/test.jsonl", b"\xef\xbb\xbf" + JSONL.replace("\n", "\r\n").encode() + b"\r\n")
    assert sides(corpus.load_domain(config(tmp_path), "law", "test")) == WANTED


def test_line_breaks_inside_a_sentence_become_a_space(tmp_path):
    write(tmp_path / "de-en/it/test.jsonl", record("a\r\nb\n\nc\n", "x"))
    pairs, faults = corpus._read(config(tmp_path), "it", "test")
    assert sides(pairs) == [("a b c", "x")]
    assert faults.repaired == {"line breaks inside a sentence": 1}


def test_unequal_line_counts(tmp_path):
    write(tmp_path / "de-en/it/test.de", DE + "noch eine\n")
    write(tmp_path / "de-en/it/test.en", EN)
    with pytest.raises(UserError, match=r"test\.de has 4 lines and .*test\.en has 3"):
        corpus.load_domain(config(tmp_path), "it", "test")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_domain(tmp_path, content):
    write(tmp_path / "de-en/it/train.jsonl", content)
    with pytest.raises(UserError, match="the train split of 'it' has no sentence"):
        corpus.load_domain(config(tmp_path), "it", "train")


def test_missing_files(tmp_path):
    write(tmp_path / "de-en/it/train.jsonl", JSONL)
    write(tmp_path / "de-en/law/train.de", DE)
    with pytest.raises(UserError, match=r"no test split of 'it': de-en/it/test\.jsonl.*files there: train\.jsonl"):
        corpus.check(config(tmp_path))
    with pytest.raises(UserError, match=r"train\.en: missing beside .*train\.de"):
        corpus.load_domain(config(tmp_path), "law", "train")
    with pytest.raises(UserError, match="no such folder"):
        corpus.load_domain(config(tmp_path / "nowhere"), "it", "train")


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-20], lambda data: b"no gzip", lambda data: data[:30] + b"xxxx" + data[34:]]
)
def test_damaged_gzip(tmp_path, damage):
    file = write(tmp_path / "de-en/it/test.jsonl.gz", b"".join(GOOD))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=r"test\.jsonl\.gz: cannot be read"):
        corpus.load_domain(config(tmp_path), "it", "test")


@pytest.mark.parametrize("content", ["[1, 2", '{"translation": 3}', "[" * 100_000, ""])
def test_damaged_array(tmp_path, content):
    write(tmp_path / "de-en/it/test.json", content)
    with pytest.raises(UserError):
        corpus.load_domain(config(tmp_path), "it", "test")


def test_a_giant_line_is_not_kept_in_memory(tmp_path):
    import tracemalloc

    file = write(tmp_path / "giant.jsonl", b"x" * 40_000_000 + b"\n" + b"\n".join([b"y"] * 3))
    tracemalloc.start()
    found = [(number, text, reason) for number, text, reason, _ in records._lines(file)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == [(1, "", "longer than 1 MB"), (2, "y\n", ""), (3, "y\n", ""), (4, "y", "")]
    assert peak < 10_000_000


# ---------------------------------------------------------------- the report


def test_leakage_counts(tmp_path):
    train = {"it": [("a", "A"), ("b", "B"), ("b", "other"), ("c", "C")], "law": [("d", "D")]}
    test = {
        "it": [("a", "A"), ("b", "other"), ("c", "different"), ("d", "D"), ("e", "E"), ("A", "a")],
        "koran": [("z", "Z")],
    }
    test["law"] = [("x", "X")]
    for split, domains in (("train", train), ("test", test)):
        for domain, pairs in domains.items():
            write(tmp_path / f"de-en/{domain}/{split}.jsonl", "".join(record(*pair) for pair in pairs))
    report = corpus.check(config(tmp_path, seen=("it", "law"), unseen=("koran",)))
    assert report.leaks == [corpus.Leak("it", "test", 6, 4, 3)]
    assert "it/test: leakage: 4 of 6 source sentences are in the training data too, 3 of them with the same" in str(
        report
    )


def test_shortage_is_said(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"de-en/it/{split}.jsonl", "".join(record(*pair) for pair in lines(5, split)))
    report = corpus.check(config(tmp_path, score_sentences=6))
    assert "it/train has 5 sentences, fewer than --data.score-sentences 6" in str(report)
    assert not corpus.check(config(tmp_path, score_sentences=5)).notes
    for split in ("train", "test"):
        write(tmp_path / f"de-en/law/{split}.jsonl", "".join(record(*pair) for pair in lines(4, split)))
    both = corpus.check(config(tmp_path, seen=("it", "law"), score_sentences=5))
    assert "scored sentences ('it' 5, 'law' 4): a domain with fewer weighs less" in str(both)
    assert len(corpus.check(config(tmp_path, seen=("it", "law"), score_sentences=4)).notes) == 0


def test_fingerprint_follows_what_is_trained(tmp_path):
    def fingerprint(**changed):
        for domain in ("it", "koran"):
            for split in ("train", "dev", "test"):
                text = changed.get(f"{domain}_{split}", "unchanged")
                write(tmp_path / f"de-en/{domain}/{split}.jsonl", record(text, "x"))
        return corpus.check(config(tmp_path, unseen=("koran",), dev_sentences=1)).fingerprint

    first = fingerprint()
    assert len(first) == 16
    assert fingerprint(it_train="other") != first
    assert fingerprint(it_dev="other") != first
    assert fingerprint(it_test="other") == first
    assert fingerprint(koran_test="other") == first


# ---------------------------------------------------------------- the hub


def hub(monkeypatch, names, rows):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda path: names)

    def load(path, name, split):
        asked.append((path, name, split))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


@pytest.mark.parametrize(
    ("names", "wanted"),
    [(["law", "it"], "it"), (["it-de-en"], "it-de-en"), (["en-de-it"], "en-de-it"), (["en-de"], "en-de"), (["x"], "x")],
)
def test_hub(monkeypatch, tmp_path, names, wanted):
    monkeypatch.chdir(tmp_path)
    rows = [{"translation": {"de": de, "en": en}} for de, en in WANTED]
    asked = hub(monkeypatch, names, rows)
    assert corpus.load_domain(config("someone/set"), "it", "dev") == [
        Pair(de, en, "it", number, ("de", "en")) for number, (de, en) in enumerate(WANTED, 1)
    ]
    assert asked == [("someone/set", wanted, "validation")]


def test_hub_without_the_domain(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    hub(monkeypatch, ["law", "koran"], [])
    with pytest.raises(UserError, match="no configuration 'it' on the hub; there are law koran"):
        corpus.load_domain(config("someone/set", seen=("it", "law")), "it", "dev")


def test_offline_is_one_line(monkeypatch, tmp_path):
    import datasets

    def offline(path):
        raise ConnectionError("Couldn't reach it\nmore\nlines")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "get_dataset_config_names", offline)
    with pytest.raises(UserError) as error:
        corpus.load_domain(config("someone/set"), "it", "dev")
    assert "no such folder" in str(error.value)
    assert "offline, name a local folder" in str(error.value)
    assert "\n" not in str(error.value)
