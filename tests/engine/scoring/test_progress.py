"""Translations that are finished are kept, unless they are damaged or were made otherwise."""

from __future__ import annotations

import pytest

from slicetune.engine.evaluation.translation import Line, Translated, cut_lines


@pytest.fixture
def finished(tmp_path) -> Translated:
    record = Translated(tmp_path, {"settings": {"seed": 0, "seen": ("it",)}, "model": "abc"})
    record.write("it.en", [Line("one", False), Line("two", True)])
    record.write("law.en", [Line("three", False)])
    return record


def test_what_is_written_is_kept(finished, tmp_path):
    again = Translated(tmp_path, {"settings": {"seed": 0, "seen": ("it",)}, "model": "abc"})
    assert again.has("it.en")
    assert again.has("law.en")
    assert not again.has("koran.en")
    assert (tmp_path / "it.en").read_text() == "one\ntwo\n"
    assert cut_lines(tmp_path) == {"it.en": 1, "law.en": 0}  # how many a limit cut comes back with them


def test_what_is_damaged_or_gone_is_not(finished, tmp_path):
    (tmp_path / "it.en").write_text("one\ntwp\n")
    (tmp_path / "law.en").unlink()
    assert not finished.has("it.en")
    assert not finished.has("law.en")


@pytest.mark.parametrize("other", [{"settings": {"seed": 1, "seen": ["it"]}, "model": "abc"}, {}])
def test_what_was_made_otherwise_is_not_and_goes(finished, tmp_path, other):
    record = Translated(tmp_path, other)
    assert not record.has("it.en")
    record.write("law.en", [Line("three", False)])
    assert record.has("law.en")
    assert not record.has("it.en")
    assert not finished.has("law.en")


def test_a_record_is_written_after_its_file(finished, tmp_path):
    """A kill between the two leaves a file that no record names: it is made again."""
    (tmp_path / "koran.en").write_text("in the dark\n")
    assert not finished.has("koran.en")
