"""LANDeRMT's analyses: every number against a second computation, and the commands on a folder of two directions."""

from __future__ import annotations

import csv
import itertools
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toys
from toys import bytes_tokenizer, model_of_bytes

from slicetune.engine import commands
from slicetune.engine.analyses import source
from slicetune.engine.analyses.landermt import awareness, projections, ranges, transfer, variants
from slicetune.engine.analyses.paired import losses
from slicetune.engine.common.errors import UserError
from slicetune.engine.common.settings import as_dict
from slicetune.engine.data.batching import pad
from slicetune.engine.data.config import DataConfig
from slicetune.engine.evaluation.config import EvaluateConfig
from slicetune.engine.methods.landermt.detection import Detection
from slicetune.engine.methods.landermt.routes import GENERAL, NOBODY, Routes
from slicetune.engine.methods.landermt.settings import Landermt
from slicetune.engine.models.config import ModelConfig
from slicetune.engine.models.sites import find_ffns
from slicetune.engine.run.config import RunConfig
from slicetune.engine.run.job import Job
from slicetune.engine.run.run import Run
from slicetune.engine.scoring.loss import target_losses
from slicetune.engine.training.config import TrainConfig

PAIRS = ("de-en", "en-fr")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run of two directions, score and select done."""
    root = tmp_path_factory.mktemp("landermt")
    model_of_bytes("bloom").save_pretrained(root / "model")
    bytes_tokenizer(chat=False).save_pretrained(root / "model")
    for code in ("de", "fr"):
        for split in ("train", "dev", "test"):
            rows = [{c: f"{c} {split} {i}" for c in (code, "en")} for i in range(4)]
            path = root / "data" / f"{code}-en" / "it" / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps({"translation": row}) + "\n" for row in rows))
    data = DataConfig(dir=str(root / "data"), pairs=PAIRS, seen=("it",), unseen=(), score_sentences=3, dev_sentences=2)
    out, model = root / "out", ModelConfig(path=str(root / "model"))
    run = Run(Job(RunConfig(out=str(out), model=model, data=data, method=Landermt(k=1, epsilon=0.5))))
    run._score()
    run._select()
    (out / "config.json").write_text(json.dumps(as_dict(run.config)))
    return out


def table(folder: Path, name: str) -> list[list[str]]:
    with open(folder / "analyses" / f"{name}.csv", encoding="utf-8", newline="") as file:
        return list(csv.reader(file))[1:]


def test_awareness_command(folder):
    commands.main(["ask", "awareness", str(folder)])
    found = Detection.load(folder / "awareness.safetensors")
    moves = table(folder, "awareness-activation")
    assert len(moves) == 2 * 2
    mean = [statistics.fmean(found.hidden[0, layer].tolist()) for layer in range(2)]
    assert [float(row[2]) for row in moves[:2]] == pytest.approx(mean, rel=1e-12)
    assert float(moves[0][4]) == pytest.approx(abs(mean[0] - mean[1]), rel=1e-9)
    assert moves[1][4] == "nan"
    for language, layer, general, specific, every, units in table(folder, "awareness-awareness"):
        phi = found.awareness[:, int(layer)].T.tolist()
        own = found.languages.index(language)
        ranked = sorted(range(len(phi)), key=lambda i: (statistics.pvariance(phi[i]), i))
        shared, rest = ranked[: len(phi) // 2], ranked[len(phi) // 2 :]
        mine = [i for i in rest if phi[i].index(max(phi[i])) == own]
        assert float(general) == pytest.approx(statistics.fmean(phi[i][own] for i in shared), rel=1e-12)
        assert int(units) == len(mine)
        if mine:
            assert float(specific) == pytest.approx(statistics.fmean(phi[i][own] for i in mine), rel=1e-12)
        assert float(every) == pytest.approx(statistics.fmean(unit[own] for unit in phi), rel=1e-12)
    first = table(folder, "awareness-k")
    assert sorted(int(row[1]) for row in first) == [0, 1]
    assert (folder / "analyses" / "awareness.html").read_text().count("<svg") >= 6


def test_epsilon_table_is_what_routes_would_be():
    found = Detection(("a-b", "b-c"), 3, 20, 4)
    generator = torch.Generator().manual_seed(0)
    for name in ("hidden_sum", "output_sum", "awareness_sum"):
        getattr(found, name).copy_(torch.rand(getattr(found, name).shape, generator=generator))
    found.prompts += 1
    found.sentences += 1
    for epsilon, general, fewest, most, low, mean, high in awareness.epsilon_rows(found, Landermt(k=2)):
        made = Landermt(k=2, epsilon=epsilon).routes_of(found)
        counts = [made.counts(position) for position in range(2)]
        assert {count["general"] for count in counts} == {general}
        own = [count[name] for count in counts for name in "abc"]
        assert (min(own), max(own)) == (fewest, most)
        assert (made.share.min(), made.share.max()) == pytest.approx((low, high), rel=1e-6)
        assert float(made.share.mean()) == pytest.approx(mean, rel=1e-6)


def toy_routes(units: int) -> Routes:
    owner = torch.tensor([[GENERAL, 0, 1, 2, NOBODY, GENERAL, 2] * units], dtype=torch.int16)[:, :units]
    takes, share = torch.tensor([[True], [True]]), torch.full((2, 1), 0.75)
    return Routes(PAIRS, ("de", "en", "fr"), (1,), takes, owner, share, "general_share", "input", 2, units)


def test_what_is_silenced():
    routes = toy_routes(37)
    phi = torch.rand(3, 2, 37, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = {name: units[1] for name, units in ranges.silences(phi, routes, "en-fr", seed=0).items()}
    tenths = [mask for name, mask in found.items() if name.endswith("%")]
    assert len(tenths) == 10
    assert torch.stack(tenths).sum(0).tolist() == [1] * 37
    mean = (phi[1, 1] + phi[2, 1]) / 2
    for low, high in itertools.pairwise(tenths):
        assert mean[low].max() < mean[high].min()
    assert {int(mask.sum()) for mask in tenths} == {3, 4}
    assert int(found["a random tenth"].sum()) == 4
    owner = routes.owner[0]
    assert torch.equal(found["general"], owner == GENERAL)
    assert torch.equal(found["own specific"], (owner == 1) | (owner == 2))
    assert torch.equal(found["others' specific"], owner == 0)


@pytest.mark.parametrize("make", [toys.model, toys.bloom])
def test_a_silenced_unit_is_a_column_of_zeros(make):
    """The same loss as with the unit's column of the last projection set to 0; afterwards the model is as before."""
    model, batch = make(), pad(toys.examples(4), 0)
    site = find_ffns(model)[1]
    last = getattr(site.module, list(site.projections.values())[-1])
    units = torch.zeros(last.in_features, dtype=torch.bool)
    units[[0, 5, 11]] = True
    before = float(losses(model, [batch]).mean())
    with ranges.without(model, {1: units}):
        got = float(losses(model, [batch]).mean())
    assert float(losses(model, [batch]).mean()) == before
    last.weight.data[:, units] = 0
    assert got == pytest.approx(float(losses(model, [batch]).mean()), rel=1e-12)
    each_token = target_losses(model, batch)
    each = [each_token[batch.target_sample == s].double().mean().item() for s in range(4)]
    assert got == pytest.approx(statistics.fmean(each), rel=1e-6)
    assert got != before


def test_ranges_command(folder):
    commands.main(["ask", "ranges", str(folder), "--sentences", "2"])
    rows = table(folder, "ranges-losses")
    kinds = [row[1] for row in rows if row[0] == "de-en"]
    assert kinds[0] == "nothing"
    assert kinds[-1] == "routed"
    assert len(kinds) == 1 + 10 + 4 + 1
    assert all(math.isfinite(float(row[3])) for row in rows)
    base = {row[0]: float(row[3]) for row in rows if row[1] == "nothing"}
    assert all(float(row[4]) == pytest.approx(float(row[3]) - base[row[0]], abs=1e-12) for row in rows)
    routes = Routes.load(folder / "routes.safetensors")
    off = next(int(row[2]) for row in rows if row[:2] == ["en-fr", "routed"])
    assert off == int((routes.gains(0)[1] == 0).sum()) > 0


def test_principal_components_equal_eigenvectors():
    x = torch.randn(30, 7, generator=torch.Generator().manual_seed(2)) @ torch.diag(torch.arange(1.0, 8))
    place, share = projections.components(x)
    values, vectors = torch.linalg.eigh(torch.cov(x.double().T, correction=0) * len(x))
    torch.testing.assert_close(share, values.flip(0)[:2] / values.sum())
    centred = x.double() - x.double().mean(0)
    for i in range(2):
        vector = vectors[:, -1 - i]
        vector = vector * vector[vector.abs().argmax()].sign()
        torch.testing.assert_close(place[:, i], centred @ vector)
    assert projections.components(torch.ones(5, 1))[0].tolist() == [[0.0]] * 5


def test_variance_between_groups():
    x, group = torch.tensor([[0.0], [2.0], [10.0], [12.0]]), torch.tensor([0, 0, 1, 1])
    assert projections.between(x, group) == pytest.approx(100 / 104)  # means 1 and 11: 4·25 of 4·25 + 4·1
    assert projections.between(torch.ones(4, 1), group) == 0


def test_pre_activations_are_each_sentences_own():
    model, sentences = toys.bloom(), toys.examples(5)
    got = projections.pre_activations(model, 1, sentences, 0)
    for example, row in zip(sentences, got, strict=True):
        alone = projections.pre_activations(model, 1, [example], 0)[0]
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-6)
    kept = []
    handle = model.transformer.h[1].mlp.dense_h_to_4h.register_forward_hook(lambda m, a, out: kept.append(out))
    model(torch.tensor([sentences[0].input_ids]))
    handle.remove()
    torch.testing.assert_close(got[0], kept[0][0].mean(0), rtol=1e-4, atol=1e-6)


def test_projections_command(folder):
    commands.main(["ask", "projections", str(folder), "--sentences", "3"])
    rows = table(folder, "projections-variance")
    assert [row[0] for row in rows] == ["general", "specific"]
    assert len(table(folder, "projections-points")) == 2 * 3 * 3
    with pytest.raises(SystemExit) as ended:
        commands.main(["ask", "projections", str(folder), "--layer", "7"])
    assert ended.value.code == 2


def test_a_run_of_another_method_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(as_dict(RunConfig(out=str(tmp_path)))))
    with pytest.raises(UserError, match="name one of LANDeRMT"):
        source.landermt_of(tmp_path)


def finished(folder: Path, trained: tuple[str, ...], scores: dict[str, float], base: bool = True) -> Path:
    """What transfer reads of a run: settings and results."""
    folder.mkdir()
    data = DataConfig(pairs=PAIRS, train_pairs=trained)
    (folder / "config.json").write_text(json.dumps(as_dict(RunConfig(out=str(folder), data=data, method=Landermt()))))
    own = {pair: {"bleu": value, "chrf": 2 * value} for pair, value in scores.items()}
    systems = {"landermt": {"pairs": own}}
    if base:
        systems["base"] = {"pairs": {pair: {"bleu": 1.0, "chrf": 3.0} for pair in PAIRS}}
    results = {"method": "landermt", "systems": systems, "learning_rate": 1e-5}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_transfer_command(tmp_path):
    one = finished(tmp_path / "one", ("de-en",), {"de-en": 4.0, "en-fr": 0.5})
    other = finished(tmp_path / "other", (), {"de-en": 2.0, "en-fr": 5.0}, base=False)
    commands.main(["ask", "transfer", str(one), str(other)])
    rows = table(one, "transfer-bleu")
    assert rows == [["de-en", "3.0", "-0.5"], ["de-en en-fr", "1.0", "4.0"]]
    assert table(one, "transfer-chrf")[0] == ["de-en", "5.0", "-2.0"]
    with pytest.raises(UserError, match="none of these runs has decoded the base"):
        transfer.gains([json.loads((other / "results.json").read_text())], "bleu")


def test_variants_are_the_run_with_one_thing_changed(tmp_path):
    run = finished(tmp_path / "run", (), {"de-en": 4.0, "en-fr": 0.5})
    config = variants.read_run(run)
    given = variants.Arguments(str(run), k=(0, 2), epsilon=(0.5,), rates=(1e-5, 1e-4), seeds=(0, 3))
    found = variants.variants(given, config, 1e-5)
    assert list(found) == [
        ("k", 2, 0),
        ("k", 4, 0),
        ("epsilon", 0.5, 0),
        ("epsilon", 0.9, 0),
        *[("rate", rate, seed) for rate in (1e-5, 1e-4) for seed in (0, 3)],
    ]
    own = [("k", 4, 0), ("epsilon", 0.9, 0), ("rate", 1e-5, 0)]  # named or not, to compare with
    assert [v for v in found if variants.is_run(v, config, 1e-5)] == own
    assert list(variants.variants(variants.Arguments(str(run), seeds=(3,)), config, 1e-5)) == [
        ("rate", 1e-5, 0),
        ("rate", 1e-5, 3),
    ]
    two, half, far = found["k", 2, 0], found["epsilon", 0.5, 0], found["rate", 1e-4, 3]
    assert (two.method, half.method) == (Landermt(k=2), Landermt(epsilon=0.5))
    assert (far.method, far.train.learning_rate, far.seed, far.score.reuse) == (Landermt(), 1e-4, 3, "")
    assert {two.score.reuse, half.score.reuse} == {str(run)}
    assert len({one.out for one in found.values()}) == 8
    with pytest.raises(UserError, match="name what is to be varied"):
        variants.Arguments(str(run))


def test_variants_table():
    means = {"all": {"bleu": 3.0, "chrf": 9.0}}
    results = {"method": "landermt", "trainable_parameters": 7, "systems": {"landermt": {"averages": means}}}
    results |= {"learning_rate": 1e-05, "sweep": {"1e-05": 2.71828}}
    base = {"averages": {"all": {"bleu": 1.0, "chrf": 2.0}}}
    rows = variants.rows_of({("k", 2, 0): results}, base)
    assert rows == [["base", None, None, 0, "", 1.0, 2.0], ["k", 2, 0, 7, "2.7183", 3.0, 9.0]]


def test_shares_are_of_every_layer_that_a_pair_is_routed_in(tmp_path):
    takes, owner = torch.tensor([[True, True], [False, True]]), torch.full((2, 4), GENERAL, dtype=torch.int16)
    share = torch.tensor([[0.5, 0.75], [0.25, 0.125]])
    for car, more in (("learned", 0.125), ("general_share", 0.0)):
        routes = Routes(PAIRS, ("de", "en", "fr"), (1, 4), takes, owner, share, car, "input", 6, 4)
        routes.save(tmp_path / car / "routes.safetensors")
        replace(routes, share=share + more).save(tmp_path / car / "model" / "routes.safetensors")
    rows = variants.share_rows(("rate", 1e-4, 3), tmp_path / "learned")
    assert rows == [
        ["rate", 1e-4, 3, "de-en", 1, 0.5, 0.625],
        ["rate", 1e-4, 3, "de-en", 4, 0.75, 0.875],
        ["rate", 1e-4, 3, "en-fr", 4, 0.125, 0.25],
    ]
    assert variants.mean_shares([*rows, ["rate", 1e-4, 5, "en-fr", 4, 0.5, 0.5]]) == [
        ["rate", 1e-4, 3, "de-en", 0.625, 0.75, 0.125],
        ["rate", 1e-4, 3, "en-fr", 0.125, 0.25, 0.125],
        ["rate", 1e-4, 5, "en-fr", 0.5, 0.5, 0.0],
    ]
    assert variants.share_rows(("k", 2, 0), tmp_path / "general_share") == []


def test_commands_that_train_on_two_ranks(folder, pool, tmp_path):
    """k = 1 is the run itself; the other run trains one direction; the tables have what the results say."""
    config = replace(
        variants.read_run(folder),
        out=str(tmp_path),
        method=Landermt(k=1, epsilon=0.5, car="learned", share_rate=30.0),
        model=ModelConfig(path=str(folder.parent / "model"), dtype="float32"),
        train=TrainConfig(learning_rate=1e-2, max_steps=1, global_batch_size=2, micro_batch_size=1, report_to=()),
        evaluate=EvaluateConfig(max_new_tokens=3),
    )
    config = replace(config, data=replace(config.data, train_sentences=2, test_sentences=2))
    found = pool.run("vary_landermt", config)[0]
    rows = table(tmp_path, "variants-scores")
    assert [row[:3] for row in rows] == [["base", "", ""], ["k", "1", "0"], ["k", "2", "0"]]
    trained = [found[name]["trainable_parameters"] for name in (".", "analyses/variants/k-2")]
    assert [int(row[3]) for row in rows[1:]] == trained == [trained[0], 2 * trained[0]]
    shares = table(tmp_path, "variants-shares-by-layer")
    assert [row[:4] for row in shares] == [["k", k, "0", pair] for k in "12" for pair in PAIRS for _ in range(int(k))]
    start, learned = (Routes.load(tmp_path / at / "routes.safetensors").share for at in (".", "model"))
    assert [[float(v) for v in row[5:]] for row in shares[:2]] == torch.cat([start, learned], 1).tolist()
    assert not torch.equal(start, learned)
    assert len(table(tmp_path, "variants-shares")) == 2 * 2
    base = found["."]["systems"]["base"]["pairs"]
    cells = table(tmp_path, "transfer-chrf")
    assert [row[0] for row in cells] == ["de-en en-fr", "de-en"]
    for row, name in zip(cells, (".", "de-en"), strict=True):
        own = found[name]["systems"]["landermt"]["pairs"]
        assert [float(cell) for cell in row[1:]] == [own[pair]["chrf"] - base[pair]["chrf"] for pair in PAIRS]
    assert len(table(tmp_path, "ranges-losses")) == 2 * 16
