"""`make faults`: every row of the table has pieces; a piece that failed, or was not run, is said."""

from __future__ import annotations

import json
import subprocess
import sys

import campaign
import pytest


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(campaign, "RESULTS", tmp_path)
    return tmp_path


def test_all_fifteen_faults_are_made_and_every_piece_has_a_name_of_its_own():
    assert [row.split()[0] for row in campaign.ROWS][:15] == [str(number) for number in range(1, 16)]
    names = [piece.name for pieces in campaign.ROWS.values() for piece in pieces]
    assert len(names) == len(set(names))
    assert campaign.FUZZED * sum(name.startswith("fuzz-") for name in names) >= 10_000
    assert sum(name.startswith("jobs-") for name in names) >= 10


def test_the_table_says_what_went_wrong_and_what_was_not_run(results):
    pieces = [campaign.Piece(name, "cut", lambda: (2, [])) for name in ("a", "b")]
    rows = {"2 damage": [*pieces, campaign.Piece("c", "flipped", lambda: (3, ["a|b\nwas accepted"]))]}
    campaign.make(pieces[0], "abc")
    assert "| 2 damage | cut | 2 | NOT RUN: 1 of 2 pieces | abc |" in campaign.table(rows)
    for piece in rows["2 damage"][1:]:
        campaign.make(piece, "def")
    text = campaign.table(rows)
    assert "| 2 damage | cut | 4 | as promised | abc, def |" in text
    assert "| 2 damage | flipped | 3 | 1 WRONG, the first: a/b was accepted | def |" in text
    assert json.loads((results / "c.json").read_text())["times"] == 3


def test_inputs_are_counted_in_the_words_of_this_hypothesis(tmp_path):
    lines = "from hypothesis import given, settings, strategies as st"
    lines += "\n@settings(max_examples=20, database=None)\n@given(st.integers())\ndef test_it(n):\n    pass\n"
    (tmp_path / "test_it.py").write_text(lines)
    command = [sys.executable, "-m", "pytest", "--hypothesis-show-statistics", "-p", "no:cacheprovider", "test_it.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert campaign.drawn(done.stdout) == 20
