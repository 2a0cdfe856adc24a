"""The report: numbers come out where they belong, whatever is missing, and nothing of the data acts as HTML."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from slicetune.engine.common.errors import UserError
from slicetune.engine.common.files import write_lines
from slicetune.engine.common.settings import as_dict
from slicetune.engine.evaluation.bleu import average
from slicetune.engine.evaluation.report import answer as output
from slicetune.engine.evaluation.report import sections
from slicetune.engine.evaluation.report.answer import Figure, Table
from slicetune.engine.evaluation.report.artefacts import Artefacts, read_metrics
from slicetune.engine.evaluation.report.figures import heat_map, loss_chart, smooth, thin, ticks
from slicetune.engine.evaluation.report.page import change
from slicetune.engine.evaluation.report.run import table, write_report
from slicetune.engine.evaluation.report.sections import bin_counts, duration
from slicetune.engine.run.config import RunConfig
from slicetune.engine.slices.neurons import NeuronSet

SEEN, UNSEEN = ["it", "law"], ["koran"]
SIGNATURES = {"bleu": "nrefs:1|case:mixed|tok:13a", "chrf": "nrefs:1|nc:6"}


def system(it: float, law: float, koran: float) -> dict:
    scores = dict(zip((*SEEN, *UNSEEN), (it, law, koran), strict=True))
    domains = {d: {"bleu": s, "chrf": s + 20, "n": 2000, "signatures": SIGNATURES} for d, s in scores.items()}
    return {"domains": domains, "averages": average(domains, SEEN, UNSEEN)}


def results(**more) -> dict:
    return {
        "systems": {"base": system(30.0, 40.0, 15.0), "caneft": system(33.5, 40.0, 14.25)},
        "trainable_parameters": 43_254_784,
        "added_parameters": 0,
        "neurons": 7,
        "peak_memory_bytes": 21_500_000_000,
        "tokens_per_second": 8123.4,
        "seconds": {"score": 61.2, "train": 3725.0},
        "seen": SEEN,
        "unseen": UNSEEN,
        "learning_rate": 1e-5,
        "method": "caneft",
        **more,
    }


def test_translations_cut_at_the_limit_are_said(tmp_path):
    found = results()
    assert "cut at" not in table(found)
    found["systems"]["caneft"]["domains"]["it"]["cut"] = 12
    found["systems"]["caneft"]["domains"]["law"]["cut"] = 0
    assert "cut at the limit      CANEFT: IT 12 of 2,000\n" in table(found)
    (run_folder(tmp_path) / "results.json").write_text(json.dumps(found))
    page = write_report(tmp_path).read_text()
    assert "cut at --evaluate.max-new-tokens: CANEFT: IT 12 of 2,000" in page


def test_signatures_stand_in_the_log():
    assert "signature             BLEU nrefs:1|case:mixed|tok:13a\n" in table(results())


def neuron_set() -> NeuronSet:
    slices = {
        (0, "gate", "row"): torch.tensor([0, 1, 47]),
        (1, "up", "row"): torch.tensor([24]),
        (1, "down", "row"): torch.tensor([0, 30, 31]),
    }
    widths, fan_in = {"gate": 48, "up": 48, "down": 32}, {"gate": 32, "up": 32, "down": 48}
    return NeuronSet(slices, 2, widths, fan_in, {"method": "caneft"})


def run_folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(as_dict(RunConfig())))
    rows = [{"step": i, "loss": 3 / i, "lr": 1e-5} for i in range(1, 200)] + [{"step": 90, "dev_loss": 0.75}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 2')
    (tmp_path / "results.json").write_text(json.dumps(results()))
    neuron_set().save(tmp_path / "neurons.safetensors")
    for name, lines in {"base": ["same", "a < b"], "caneft": ["same", "<script>alert(1)</script>"]}.items():
        write_lines(tmp_path / "translations" / name / "it.en", lines)
    return tmp_path


class Page(HTMLParser):
    """Checks that tags close in order, and collects text, tags and references to anything outside the file."""

    EMPTY = ("meta", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.tags, self.links, self.words = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "onload", "onclick")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def test_terminal_table_is_aligned_and_complete():
    text = table(results(report="runs/x/report.html"))
    lines = text.splitlines()
    scores = [line for line in lines if re.search(r"\d\.\d\d", line)]
    assert len({len(line) for line in scores}) == 1
    cells = {line[:12].strip(): re.findall(r"[+-]?\d+\.\d\d", line) for line in scores}
    assert cells["IT"] == ["30.00", "33.50", "50.00", "53.50", "+3.50", "+3.50"]
    assert cells["seen, mean"] == ["35.00", "36.75", "55.00", "56.75", "+1.75", "+1.75"]
    assert cells["unseen, mean"] == ["15.00", "14.25", "35.00", "34.25", "-0.75", "-0.75"]
    assert cells["all, mean"][:2] == ["28.33", "29.25"]
    assert "43,254,784" in text
    assert "score 1 min 01 s · train 1 h 02 min · all 1 h 03 min" in text
    assert lines[-1].split() == ["report", "runs/x/report.html"]


def test_terminal_table_without_base_and_unseen_domains():
    only = results(unseen=[])
    del only["systems"]["base"]
    only["systems"]["caneft"]["averages"].pop("unseen")
    text = table(only)
    assert "Base" not in text
    assert "all, mean" not in text
    assert "unseen" not in text
    assert "36.75" in text


def test_page_holds_every_part_and_nothing_from_outside(tmp_path):
    path = write_report(run_folder(tmp_path))
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert path == tmp_path / "report.html"
    assert page.links == []
    assert "script" not in page.tags
    assert "url(" not in html
    assert page.tags.count("svg") == 5  # loss, layers × projections, three projections by index
    for part in (
        "CANEFT: German → English",
        "BLEU went from 35.00 to 36.75 on seen domains (+1.75) and from 15.00 to 14.25 on unseen domains (−0.75)",
        "7 of 256 neurons (2.73%) were chosen; their 43,254,784 weights were trained for 199 steps of 5 sentences",
        "21.50 GB",
        "8,123 tokens/s",
        "BLEU nrefs:1|case:mixed|tok:13a",
        "global_batch_size",
        "dev loss 0.7500 at step 90 (lowest)",
        "layer 1, down: 3",
        "<script>alert(1)</script>",  # as text
        "IT: 1 of 2 sentences differ",
    ):
        assert part in page.text, part
    assert "same" not in page.text.split()[page.text.split().index("Translations") :]
    row = re.search(r"<tr><td>IT</td>(.*?)</tr>", html)[1]
    cells = re.findall(r"<td>(?:<[^>]*>)?([^<]*)", row)
    assert cells == ["2,000", "30.00", "33.50", "+3.50", "50.00", "53.50", "+3.50"]


def test_analyses_stand_in_the_report_and_one_that_ends_writes_it_again(tmp_path, capsys):
    figures = [Figure("BLEU < chrF", '<svg role="img"></svg>', "Of all"), Figure("Nothing", "")]
    tables = [Table("t", ["a"], [[1]], "Numbers")]
    output.write(run_folder(tmp_path), "overlap", "Overlap & more", "Words.", tables, figures)
    assert not (tmp_path / "report.html").exists()
    once = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == once
    output.write(tmp_path, "chosen", "Chosen neurons", "Words.", tables, [Figure("Where", "<svg></svg>")])
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.links == ["analyses/chosen.html", "analyses/overlap.html"]
    assert page.tags.count("svg") == 5 + 2
    assert html.count('<figure><svg role="img"></svg><figcaption>Of all</figcaption></figure>') == 1
    part = page.text.partition("Analyses ")[2].partition("How it was made")[0]
    places = [part.find(name) for name in ("Chosen neurons", "Where", "Overlap & more", "BLEU < chrF")]
    assert places == sorted(places)
    assert places[0] >= 0
    assert "Numbers" not in part
    assert "Nothing" not in part


def test_an_analysis_leaves_a_comparisons_report_alone(tmp_path, capsys):
    (tmp_path / "report.html").write_text("compared")
    output.write(tmp_path, "overlap", "Overlap", "Words.", [])
    assert (tmp_path / "report.html").read_text() == "compared"


def test_source_and_reference_stand_above_the_translations(tmp_path):
    run_folder(tmp_path)
    write_lines(tmp_path / "translations" / "source" / "it.de", ["gleich", "kleiner"])
    write_lines(tmp_path / "translations" / "reference" / "it.en", ["same", "smaller"])
    (part,) = sections.translations(Artefacts.read(tmp_path))
    cells = re.findall(r"<td>(.*?)</td>", part)
    assert cells[::2] == ["2 source", "reference", "Base", "CANEFT"]
    assert cells[1:6:2] == ["kleiner", "smaller", "a &lt; b"]


def test_page_of_a_run_without_most_artefacts(tmp_path):
    bare = results(seconds={}, neurons=0, peak_memory_bytes=0, tokens_per_second=0.0, method="full")
    bare["systems"] = {"full": bare["systems"]["caneft"]}
    (tmp_path / "results.json").write_text(json.dumps(bare))
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "svg" not in page.tags
    assert "Loss" not in page.words
    assert "Full on 2 domains" in page.text
    assert "36.75" in page.text
    with pytest.raises(UserError, match=r"results\.json is missing"):
        write_report(tmp_path / "nowhere")


def test_metrics_are_merged_by_step_and_a_cut_line_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 2, "loss": 1.0}', '{"step": 1, "loss": 2.0}', '{"step": 2, "dev_loss": 3.0}']
    path.write_text("\n".join([*lines, '{"step": 1, "loss": 2.5}', '{"step": 3, "lo']))
    assert read_metrics(path) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.0, "dev_loss": 3.0}]
    assert read_metrics(tmp_path / "none") == []


def test_bins_are_equal_parts_of_the_index():
    neurons = neuron_set()
    gate = bin_counts(neurons, "gate", "row")
    assert (len(gate), len(gate[0])) == (2, 15)
    assert gate[0] == [2, *[0] * 13, 1]
    assert sum(gate[1]) == 0
    assert bin_counts(neurons, "up", "row")[1].index(1) == 24 * 15 // 48
    assert [len(row) for row in bin_counts(neurons, "down", "row", bins=100)] == [32, 32]
    columns = NeuronSet({(0, "down", "column"): torch.tensor([47])}, 2, neurons.widths, neurons.fan_in)
    assert bin_counts(columns, "down", "column")[0] == [*[0] * 14, 1]


def test_ffn_units_are_drawn_and_described_as_slices(tmp_path):
    run_folder(tmp_path)
    base = neuron_set()
    units = {(0, "gate", "row"): torch.tensor([3]), (0, "down", "column"): torch.tensor([3])}
    NeuronSet(units, 2, base.widths, base.fan_in).save(tmp_path / "neurons.safetensors")
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "2 slices of FFN units were chosen" in page.text
    assert "down columns" in page.text


def test_heat_map_cells_grow_with_their_counts():
    svg = heat_map([[0, 5], [10, 2]], ["", ""], numbers=True)
    strengths = [float(x) for x in re.findall(r'fill-opacity="([\d.]+)"', svg)]
    assert strengths[0] == 0
    assert strengths[2] == 1 == max(strengths)
    assert strengths[1] > strengths[3] > 0
    assert re.findall(r'class="(?:weak|strong)"[^>]*>(\d+)<', svg) == ["5", "10", "2"]
    half = heat_map([[5]], [""], most=10)
    assert f'fill-opacity="{strengths[1]:.3f}"' in half


def test_loss_chart_places_points_and_marks_the_best():
    svg = loss_chart([(0, 4.0), (10, 2.0), (20, 1.0)], [(10, 2.5), (20, 2.0)])
    train = [tuple(map(float, p.split(","))) for p in re.search(r'class="train" points="([^"]*)"', svg)[1].split()]
    assert [x for x, _ in train] == sorted(x for x, _ in train)
    assert train[1][0] == pytest.approx((train[0][0] + train[2][0]) / 2, abs=0.1)
    assert (train[1][1] - train[0][1]) == pytest.approx(2 * (train[2][1] - train[1][1]), abs=0.2)  # 4 → 2 → 1
    assert train[0][1] < train[1][1] < train[2][1]  # a smaller loss is further down
    assert svg.count("(lowest)") == 1
    assert "dev loss 2.0000 at step 20 (lowest)" in svg


def test_loss_chart_survives_odd_curves():
    assert loss_chart([], []) == ""
    assert loss_chart([(1, math.nan)], [(1, math.inf)]) == ""
    for train, dev in (([(1, 2.0)], []), ([], [(5, 1.0)]), ([(i, 0.0) for i in range(5000)], [(1, 0.0)])):
        svg = loss_chart(train, dev)
        assert "nan" not in svg
        assert "inf" not in svg
        Page(svg)


def test_curves_are_thinned_and_smoothed():
    points = [(float(i), float(i % 2)) for i in range(1000)]
    few = thin(points, 100)
    assert len(few) == 100
    assert all(y == pytest.approx(0.5) for _, y in few)
    assert thin(points, 1000) == points
    assert smooth([(i, 3.0) for i in range(9)], 4) == [(i, pytest.approx(3.0)) for i in range(9)]
    assert smooth(points, 1) == points
    assert smooth([(0, 0.0), (1, 1.0)], 2)[1][1] == pytest.approx(1 / 1.5)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0.93, 1.31, [1.0, 1.1, 1.2, 1.3]), (-3, 3, [-2, 0, 2]), (5, 5, [5])],
)
def test_ticks_are_round_numbers_inside(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.06, "8.1 s"), (59.96, "1 min 00 s"), (192, "3 min 12 s"), (3599.6, "1 h 00 min"), (3725, "1 h 02 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_differences_have_signs():
    assert change(1.5) == '<span class="up">+1.50</span>'
    assert change(-1.5) == '<span class="down">−1.50</span>'
    assert change(-0.001) == "0.00"


def test_peak_memory_stands_by_stage(tmp_path):
    """The run measured scoring alone: training's cell is empty."""
    folder = run_folder(tmp_path)
    found = json.loads((folder / "results.json").read_text())
    assert "GB" not in sections.time(Artefacts.read(folder))
    found |= {"peak_memory": {"score": 34_507_000_000}, "ranks": 8}
    (folder / "results.json").write_text(json.dumps(found))
    part = sections.time(Artefacts.read(folder))
    assert re.findall(r"[\d.]+ GB", part) == ["34.51 GB"]
    assert "the rank that held most, of 8;" in part
    assert "\npeak memory, GB       score 34.51\n" in f"{table(found)}\n"


def test_settings_are_shown_part_by_part(tmp_path):
    run = Artefacts.read(run_folder(tmp_path))
    parts = list(sections.settings(run))
    assert [re.search("<summary>(.*?)<", part)[1] for part in parts] == [
        f"Settings: {name}"
        for name in ("model", "data", "score", "method", "train", "zero", "export", "evaluate", "run")
    ]
    assert "<td>seen</td><td><code>it law medical subtitles</code></td>" in parts[1]
