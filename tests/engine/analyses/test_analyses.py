"""The analyses' mathematics against brute force and scipy, their charts, tables and refusals; no run needed."""

from __future__ import annotations

import copy
import csv
import json
import math
import random
from collections import Counter
from dataclasses import asdict, replace
from itertools import product
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import toys
from scipy import stats as scipy_stats
from sklearn.metrics import mutual_info_score

from slicetune.engine import commands
from slicetune.engine.analyses import change, chosen, control, ratios, readings, silence, verdicts
from slicetune.engine.analyses import paired as paired_module
from slicetune.engine.analyses.paired import Paired, holm, paired, sentence_losses
from slicetune.engine.analyses.source import caneft_of, without_domain
from slicetune.engine.common.errors import UserError
from slicetune.engine.common.settings import as_dict
from slicetune.engine.data.batching import pad
from slicetune.engine.data.prompts import SYSTEMS
from slicetune.engine.evaluation.report import charts
from slicetune.engine.evaluation.report.answer import Figure, Table, write
from slicetune.engine.export import delta
from slicetune.engine.methods.caneft.settings import Caneft, Rcn
from slicetune.engine.methods.lape import Lape
from slicetune.engine.run.config import RunConfig
from slicetune.engine.slices import overlap as neurons_module
from slicetune.engine.slices.neurons import NeuronSet, thirds
from slicetune.engine.slices.patches import Patch

# ---------------------------------------------------------------- two models on the same sentences


def test_paired_interval_is_students():
    a, b = torch.randn(2, 30, generator=torch.Generator().manual_seed(0)).double()
    found, theirs = paired(a, b), scipy_stats.ttest_rel(a.numpy(), b.numpy())
    interval = theirs.confidence_interval(0.95)
    assert found.difference == pytest.approx(float((a - b).mean()))
    assert (found.low, found.high, found.p) == pytest.approx((interval.low, interval.high, theirs.pvalue), abs=1e-12)


def test_paired_of_what_has_no_spread():
    a = torch.arange(4.0)
    assert paired(a, a) == Paired(0.0, 0.0, 0.0, 1.0, 4)
    assert paired(a + 0.5, a).p == 0.0
    single = paired(a[:1] + 2, a[:1])
    assert single.difference == 2.0
    assert math.isnan(single.low)
    assert math.isnan(single.p)


def rejected(p: list[float], level: float) -> set[int]:
    """Holm's procedure as he wrote it: step down through the ordered p until one fails."""
    out = set()
    for place, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        if p[i] > level / (len(p) - place):
            break
        out.add(i)
    return out


def test_holm_rejects_what_the_procedure_rejects():
    draw = random.Random(0)
    for _ in range(50):
        p = [draw.random() ** 3 for _ in range(draw.randint(1, 7))]
        adjusted = holm(p)
        for level in (0.01, 0.05, 0.2, 0.5):
            assert {i for i, value in enumerate(adjusted) if value <= level} == rejected(p, level), (p, level)


def test_sentence_losses_are_those_of_sentences_alone():
    model, sentences = toys.model(), toys.examples(9)
    found, tokens = sentence_losses(model, sentences, 0, tokens_per_batch=40)
    for i, one in enumerate(sentences):
        with torch.no_grad():
            logits = model(torch.tensor([one.input_ids])).logits[0, one.target_start - 1 : -1]
        alone = torch.nn.functional.cross_entropy(logits, torch.tensor(one.input_ids[one.target_start :]))
        assert found[i] == pytest.approx(float(alone), abs=1e-5)
        assert tokens[i] == len(one.input_ids) - one.target_start


# ---------------------------------------------------------------- readings


def test_every_reading_comes_once_and_the_default_first():
    config = RunConfig(method=Caneft(neuron_ratio=0.03))
    found = readings.readings(config, ("specific", "one_vs_rest", "joint"), (None, 0.1, 0.2, 0.5))
    kinds = [(type(r.method), tuple(asdict(r.method).items()), tuple(asdict(r.score).items())) for r in found]
    assert len(set(kinds)) == len(found) == len({r.folder for r in found}) == 17
    assert (found[0].method, found[0].score, found[0].name) == (config.method, config.score, "default")
    assert type(found[1].method) is Rcn
    grid = {(r.method.consensus, r.method.task_ratio) for r in found if r.score == config.score}
    assert grid >= set(product(("specific", "one_vs_rest", "joint"), (None, 0.1, 0.2, 0.5)))
    assert {r.name for r in found[2:6]} == {
        "tokens target",
        "token_reduce abs_sum",
        "task merge intersection",
        "task merge union",
    }
    own = asdict(config.method) | asdict(config.score)
    for one in found[2:6]:
        changed = [k for k, v in (asdict(one.method) | asdict(one.score)).items() if v != own[k]]
        assert len(changed) == 1, one.name
    with pytest.raises(UserError, match="LAPE"):
        readings.readings(RunConfig(method=Lape()), ("joint",), (None,))
    with pytest.raises(UserError, match="RCN"):
        readings.readings(RunConfig(method=Rcn()), ("joint",), (None,))


def result(name: str, shift: float, neurons: NeuronSet | None, noise: float = 0.01) -> verdicts.Result:
    base = torch.linspace(1, 2, 50, dtype=torch.float64)
    wobble = noise * torch.randn(50, generator=torch.Generator().manual_seed(len(name))).double()
    losses = base + shift + (wobble - wobble.mean() if shift else 0)
    reading = verdicts.Reading(name, Caneft(), RunConfig().score)
    return verdicts.Result(reading, neurons, losses, paired(losses, base), 0.5)


def test_verdicts_need_significance_after_correction():
    sets = [toys.neurons(**{"0.gate.row": [i]}) for i in range(4)]
    first = [
        result("default", 0.0, sets[0]),
        result("far better", -0.05, sets[1]),
        result("worse", 0.05, sets[2]),
        result("alike", 1e-5, sets[3]),
        result("same", 0.0, sets[0]),
        result("base", 0.3, None),
    ]
    found = verdicts.verdicts(first)
    words = ["the default", "better", "worse", "no difference shown", "same neurons", "worse"]
    assert [word for _, word in found] == words
    tested = holm([first[i].versus.p for i in (1, 2, 3, 4)])
    assert [p for p, _ in found][1:4] == pytest.approx(tested[:3])


def test_seeds_must_agree_too():
    sentence = torch.linspace(1, 2, 50, dtype=torch.float64)
    lines = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).double() * 1e-3
    default = verdicts.Seeds("default", sentence + torch.zeros(3, 1), [])
    steady = verdicts.Seeds("steady", default.losses - 0.02 + lines, [])
    fickle = verdicts.Seeds("fickle", default.losses + torch.tensor([[-0.1], [0.03], [0.01]]) + lines, [])
    assert verdicts.seeds_agree(steady, default)[2]
    sentences, seeds, better = verdicts.seeds_agree(fickle, default)
    assert sentences.high < 0 < seeds.high
    assert not better
    single = [verdicts.Seeds(s.name, s.losses[:1], []) for s in (steady, default)]
    assert not verdicts.seeds_agree(*single)[2]


# ---------------------------------------------------------------- overlap


def as_set(neurons: NeuronSet) -> set:
    return {(*key, i) for key, index in neurons.slices.items() for i in index.tolist()}


def test_overlap_is_that_of_sets():
    a, b = toys.neurons(), toys.units()
    c = toys.neurons(**{"0.gate.row": [1, 2, 47], "0.up.row": [0], "1.down.row": [3, 5]})
    for one, other in product((a, b, c), repeat=2):
        x, y = as_set(one), as_set(other)
        assert neurons_module.common(one, other) == len(x & y)
        assert neurons_module.share(one, other) == pytest.approx(len(x & y) / len(x))
        assert neurons_module.jaccard(one, other) == pytest.approx(len(x & y) / len(x | y))
    assert neurons_module.share(a, a) == neurons_module.jaccard(b, b) == 1.0
    other = NeuronSet({}, 3, a.widths, a.fan_in)
    with pytest.raises(UserError, match="different models"):
        neurons_module.common(a, other)


# ---------------------------------------------------------------- control


def lengths_of(seed: int, domains: int = 3) -> list[list[tuple[int, int]]]:
    draw = random.Random(seed)
    return [[(draw.randint(1, 12 + d), draw.randint(1, 9 + 2 * d)) for _ in range(60 + d)] for d in range(domains)]


@pytest.mark.parametrize("cell", [1, 3])
def test_matching_takes_all_that_every_domain_has(cell):
    lengths = lengths_of(cell)
    chosen_ = control.match(lengths, cell)
    cells = [Counter((s // cell, t // cell) for s, t in domain) for domain in lengths]
    expected = {key: min(c[key] for c in cells) for key in cells[0]}
    for domain, indices in zip(lengths, chosen_, strict=True):
        assert len(set(indices)) == len(indices)
        taken = Counter((domain[i][0] // cell, domain[i][1] // cell) for i in indices)
        assert taken == Counter({key: n for key, n in expected.items() if n})


def test_thinned_matches_are_still_alike():
    lengths = lengths_of(7)
    some = control.match_alike(lengths, 3, 10, seed=1)
    cells = [Counter((d[i][0] // 3, d[i][1] // 3) for i in indices) for d, indices in zip(lengths, some, strict=True)]
    assert cells[0] == cells[1] == cells[2]
    assert sum(cells[0].values()) == 10
    assert some == control.match_alike(lengths, 3, 10, seed=1)
    assert some != control.match_alike(lengths, 3, 10, seed=2)


def test_length_information_is_that_of_deciles():
    lengths = [[(s + 5 * d, t) for s, t in domain] for d, domain in enumerate(lengths_of(3))]
    source, target = control.length_information(lengths, Caneft())
    groups = [d for d, domain in enumerate(lengths) for _ in domain]
    for side, found in enumerate((source, target)):
        values = [pair[side] for domain in lengths for pair in domain]
        ordered = sorted(values)
        middle = {v: ordered.index(v) + ordered.count(v) / 2 for v in set(values)}
        deciles = [min(9, int(10 * middle[v] / len(values))) for v in values]
        assert found == pytest.approx(mutual_info_score(groups, deciles), abs=1e-9)
    assert source > 3 * target


def test_floor_is_what_independence_leaves():
    draw, found = np.random.default_rng(0), []
    for _ in range(100):
        bins, groups = draw.permutation(np.arange(800) % 10), np.arange(800) // 200
        found.append(mutual_info_score(groups, bins))
    assert np.mean(found) == pytest.approx(control.floor_of(10, 4, 800), rel=0.08)


def test_dealing_keeps_how_many_sentences_a_domain_has():
    sentences = toys.examples(40, groups=4)
    dealt = control.deal(sentences, 0)
    assert Counter(s.group for s in dealt) == Counter(s.group for s in sentences)
    assert [s.input_ids for s in dealt] == [s.input_ids for s in sentences]
    assert sum(a.group != b.group for a, b in zip(dealt, sentences, strict=True)) > 15
    assert [s.group for s in sentences] == [i % 4 for i in range(40)]


def test_a_prompt_without_its_domain():
    assert without_domain(SYSTEMS["short"]) == "Translate from {src} into {tgt}."
    for text in SYSTEMS.values():
        plain = without_domain(text)
        assert "domain" not in plain.lower()
        assert "{tgt}" in plain
        assert "  " not in plain
    with pytest.raises(UserError, match="--plain-prompt"):
        without_domain("{domain}: into {tgt}")


# ---------------------------------------------------------------- silence


@pytest.fixture(scope="module")
def batches():
    sentences = toys.examples(6)
    return [pad(sentences[:4], 0), pad(sentences[4:], 0)]


def test_silence_is_a_weight_row_of_zeros(batches):
    model = toys.model()
    channels = [(0, "gate", 5), (0, "up", 5), (1, "down", 3), (1, "up", 40)]
    found = silence.true_changes(model, batches, channels)
    before = paired_module.losses(model, batches)
    for row, (layer, role, index) in zip(found, channels, strict=True):
        other = copy.deepcopy(model)
        getattr(other.model.layers[layer].mlp, f"{role}_proj").weight.data[index] = 0
        torch.testing.assert_close(row, paired_module.losses(other, batches) - before, atol=1e-6, rtol=1e-5)
    assert float(found.abs().max()) > 1e-4
    assert torch.equal(paired_module.losses(model, batches), before)


def test_scores_are_activation_times_gradient(batches):
    channels = [(0, "gate", 5), (1, "up", 7), (1, "down", 3)]
    found = {r: silence.scores(toys.model(), batches, channels, r) for r in silence.REDUCTIONS}
    row = 0
    for batch in batches:
        for start, stop in batch.segments.tolist():
            model, kept = toys.model().double(), {}
            ids = batch.input_ids.flatten()[start:stop]
            for layer, role, _ in channels:
                linear = getattr(model.model.layers[layer].mlp, f"{role}_proj")
                linear.register_forward_hook(lambda m, i, out, key=(layer, role), kept=kept: kept.__setitem__(key, out))
            logits = model(ids[None]).logits[0]
            sample = [i for i, p in enumerate(batch.predict.tolist()) if start <= p < stop]
            at = batch.predict[sample] - start
            loss = torch.nn.functional.cross_entropy(logits[at], batch.target[sample])
            grads = torch.autograd.grad(loss, list(kept.values()))
            for i, ((layer, role, index), grad) in enumerate(zip(channels, grads, strict=True)):
                product_ = (kept[layer, role] * grad)[0, :, index].detach()
                assert float(found["mean_abs"][i, row]) == pytest.approx(float(product_.abs().mean()), rel=1e-3)
                assert float(found["abs_sum"][i, row]) == pytest.approx(float(product_.sum().abs()), rel=1e-3)
            row += 1


def test_channels_are_drawn_from_all_layers_and_gate_and_up_alike():
    drawn = silence.draw(4, {"gate": 50, "up": 50, "down": 20}, 40, seed=0)
    by = {role: [(layer, i) for layer, r, i in drawn if r == role] for role in ("gate", "up", "down")}
    assert by["gate"] == by["up"]
    assert all(len(set(found)) == 40 and {layer for layer, _ in found} == {0, 1, 2, 3} for found in by.values())
    assert all(i < 20 for _, i in by["down"])
    assert drawn == silence.draw(4, {"gate": 50, "up": 50, "down": 20}, 40, seed=0)


def test_correlations_by_projection():
    channels = [(0, role, i) for role in ("gate", "down") for i in range(5)]
    change_ = torch.tensor([[(i + 1.0) * (-1) ** s for s in range(3)] for _, _, i in channels]).double()
    score = {"abs_sum": change_.abs(), "mean_abs": -change_.abs()}
    gate, down, both = silence.correlations(channels, score, change_)
    assert gate[:2] == ["gate", 5]
    assert gate[2:] == pytest.approx([-1, -1, -1, 1, 1, 1])
    assert down[2:] == gate[2:]
    assert both[:2] == ["all", 10]
    assert math.isnan(silence.spearman(torch.ones(4), torch.arange(4.0)))


# ---------------------------------------------------------------- chosen, change, ratios


def test_bars_count_every_neuron_once():
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0)).double() ** 2
    marked = torch.randperm(1000)[:50]
    counts, kept, edges = chosen.bars(values, marked, 20)
    expected, theirs = np.histogram(values.numpy(), bins=20)
    assert (counts, edges) == (expected.tolist(), pytest.approx(theirs.tolist()))
    assert kept == np.histogram(values[marked].numpy(), bins=theirs)[0].tolist()
    assert chosen.bars(torch.full((5,), 0.25), torch.tensor([2]), 4)[:2] == ([5, 0, 0, 0], [1, 0, 0, 0])


def test_map_holds_every_chosen_slice():
    neurons = toys.neurons()
    rows = chosen.map_rows(neurons)
    assert sum(row[-1] for row in rows) == neurons.count
    gate = [row for row in rows if row[:3] == ["gate", "row", 1]]
    assert [row[-1] for row in gate][:4] == [2, 1, 1, 1]  # 2, 3, 4, 7, 11 of 48 in 15 parts
    by = chosen.by_projection(torch.arange(256.0), neurons)
    assert [row[:3] for row in by] == [["gate", 96, 8], ["up", 96, 3], ["down", 64, 1], ["all", 256, 12]]
    assert by[2][3:] == [float(torch.cat([torch.arange(96, 128), torch.arange(224, 256)]).median()), 227.0]


def test_changes_are_those_of_the_trained_weights(tmp_path):
    run = tmp_path / "caneft"
    base, trained, neurons = toys.model(), toys.model(), toys.neurons()
    base.save_pretrained(tmp_path / "base")
    expected: dict = {}
    patches = {}
    for (layer, role, _), index in neurons.slices.items():
        name = f"model.layers.{layer}.mlp.{role}_proj.weight"
        move = torch.randn(len(index), base.get_parameter(name).shape[1])
        trained.get_parameter(name).data[index] += move
        part = next(t for t, layers in zip(change.THIRDS, thirds(2), strict=True) if layer in layers)
        expected.setdefault((role, part), []).append(
            (trained.get_parameter(name) - base.get_parameter(name)).detach()[index].abs().flatten()
        )
        patches[name] = Patch("row", index, trained.get_parameter(name).detach()[index])
    trained.save_pretrained(run / "model")
    delta.write(tmp_path / "base", run / "model", patches, run / "delta")
    found = change.mean_changes(run)
    assert found.keys() == expected.keys()
    for place, (mean, count) in found.items():
        assert (mean, count) == (
            pytest.approx(float(torch.cat(expected[place]).mean())),
            len(torch.cat(expected[place])),
        )
    commands.main(["ask", "change", str(run)])
    rows = list(csv.reader((run / "analyses" / "change-thirds.csv").open()))
    assert rows[0] == ["projection", "layers", "caneft", "caneft, weights"]
    (run / "chosen.json").write_text('{"checkpoint": "sweep/lr-0.003/checkpoints/step-50", "learning_rate": 0.003}')
    assert change.updates("CANEFT", run) == "CANEFT 50 at 0.003"
    assert change.updates("RCN", tmp_path) == "RCN unknown"
    with pytest.raises(UserError, match="no model/ and delta/"):
        change.mean_changes(tmp_path / "base")


def results(bleu: float, trained: int, base: bool) -> dict:
    system = {"domains": {"it": {"bleu": bleu}, "koran": {"bleu": bleu / 2}}}
    system |= {"averages": {"seen": {"bleu": bleu}, "unseen": {"bleu": bleu / 2}}}
    systems = {"base": {**system, "domains": {"it": {"bleu": 1.0}, "koran": {"bleu": 0.5}}}} if base else {}
    systems["caneft"] = system
    return {
        "systems": systems,
        "method": "caneft",
        "seen": ["it"],
        "unseen": ["koran"],
        "trainable_parameters": trained,
        "learning_rate": 0.003,
        "sweep": {"0.001": 2.0, "0.003": 1.23456 if base else float("inf")},
    }


def test_ratios_are_rows_and_the_base_is_none_of_them(tmp_path):
    found = {0.005: results(10.0, 100, False), 0.01: results(12.0, 200, True)}
    rows = ratios.rows_of(found, "bleu")
    assert rows[0][:5] == [0.0, 0, "", 1.0, 0.5]
    assert rows[1:] == [[0.5, 100, "", 10.0, 5.0, 10.0, 5.0], [1.0, 200, "1.2346", 12.0, 6.0, 12.0, 6.0]]
    sweeping = replace(RunConfig().train, sweep=(1e-5, 1e-3))
    (tmp_path / "config.json").write_text(json.dumps(as_dict(RunConfig(out=str(tmp_path), train=sweeping))))
    config = ratios.settings(tmp_path, 0.02, 1e-3)
    assert (config.method.neuron_ratio, config.train.learning_rate, config.train.sweep) == (0.02, 1e-3, ())
    assert config.score.reuse == str(tmp_path)
    with pytest.raises(UserError, match=r"results\.json"):
        ratios.sweep(tmp_path, (0.01,))


# ---------------------------------------------------------------- tables, charts


def test_only_a_caneft_run_has_readings():
    assert caneft_of(RunConfig()) == Caneft()
    with pytest.raises(UserError, match="RCN"):
        caneft_of(RunConfig(method=Rcn()))


def test_page_and_csv(tmp_path, capsys):
    table = Table("rows", ["name", "value"], [["a <b>", 0.123456], ["none", None], ["many", 12345]], "Some", 2)
    silent = Table("all", ["x"], [[1.0]], shown=False)
    path = write(
        tmp_path, "demo", "Title", "Words & more.", [table, silent], [Figure("Figure", charts.matrix([[1]], ["m"]))]
    )
    html, text = path.read_text(), capsys.readouterr().out
    assert "a &lt;b&gt;" in html
    assert "<b>" not in html
    assert "Words &amp; more." in html
    assert html.count("<table") == 1
    assert "0.12" in text
    assert "12,345" in text
    rows = list(csv.reader((tmp_path / "analyses" / "demo-rows.csv").open()))
    assert rows == [["name", "value"], ["a <b>", "0.123456"], ["none", ""], ["many", "12345"]]
    assert (tmp_path / "analyses" / "demo-all.csv").read_text() == "x\n1.0\n"
    with pytest.raises(UserError, match="no such folder"):
        write(tmp_path / "nowhere", "demo", "Title", "", [], [])


def parsed(svg: str) -> ElementTree.Element:
    assert "nan" not in svg
    assert "inf" not in svg.replace("information", "")
    return ElementTree.fromstring(svg)


def test_lines_place_points_and_labels():
    curves = {"IT": [(0.25, 10.0), (1.0, 12.0)], "law": [(0.25, 10.2), (1.0, 12.1)], "odd": [(0.5, math.nan)]}
    root = parsed(charts.lines(curves, "ratio", "BLEU"))
    first, second = (p.get("points").split() for p in root.findall("polyline"))
    (x0, y0), (x1, y1) = (tuple(map(float, p.split(","))) for p in first)
    assert x0 < x1
    assert y0 > y1  # higher is up
    assert float(second[0].split(",")[1]) < y0
    heights = sorted(float(t.get("y")) for t in root.findall("text") if t.get("class", "").startswith("label"))
    assert heights[1] - heights[0] >= charts.GAP - 0.1
    assert charts.lines({"IT": []}, "x", "y") == ""
    parsed(charts.lines({"IT": [(1.0, 5.0)]}, "x", "y"))


def test_histogram_bars_are_logarithmic():
    root = parsed(charts.histogram([1000, 100, 0, 1], [0, 10, 0, 1], [0.0, 0.1, 0.2, 0.3, 0.4], "nats", 0.15))
    heights = [float(r.get("height")) for r in root.findall("rect") if r.get("class") == "faint"]
    assert len(heights) == 3
    assert heights[0] - heights[1] == pytest.approx((heights[1] - heights[2]) / 2, abs=0.2)
    assert len([r for r in root.findall("rect") if r.get("class") == "s1"]) == 2
    assert charts.histogram([0], [0], [0.0, 1.0], "nats") == ""


def test_intervals_are_marked_where_they_exclude_zero():
    root = parsed(
        charts.intervals([("a", -0.02, -0.03, -0.01), ("b", 0.0, -0.01, 0.01), ("c", 0, math.nan, 1)], "nats")
    )
    assert [line.get("class") for line in root.findall("line")] == ["mark", "s0", "s5"]
    assert charts.intervals([], "nats") == ""


def test_other_charts_are_whole():
    root = parsed(charts.scatter({"gate": [(1e-3, 1e-2), (0.0, 1.0)], "up": [(1e-1, 1.0)]}, "score", "change"))
    places = [(float(c.get("cx")), float(c.get("cy"))) for c in root.findall("circle")]
    assert len(places) == 2
    assert places[0][0] < places[1][0]
    assert places[0][1] > places[1][1]
    assert charts.scatter({"gate": [(0.0, 1.0)]}, "score", "change") == ""
    bars = parsed(charts.grouped_bars(["gate lower", "gate upper"], {"a": [1.0, 2.0], "b": [0.5, 0.0]}, "mean"))
    heights = [float(r.get("height")) for r in bars.findall("rect")]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)
    assert heights[0] == pytest.approx(2 * heights[2], abs=0.2)
    assert charts.grouped_bars(["a"], {"x": [0.0]}, "mean") == ""
    cells = parsed(charts.matrix([[1.0, 0.25], [None, 1.0]], ["a", "b"])).findall("rect")
    assert len([c for c in cells if c.get("class") == "cell"]) == 3
