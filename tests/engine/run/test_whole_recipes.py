"""LANDeRMT's recipes as a user starts them, on small random models of their kinds: from detection to a folded model."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from baichuans import PLAIN, lay_out, train_pieces
from toys import bytes_tokenizer, model_of_bytes
from transformers import AutoModelForCausalLM, AutoTokenizer

from slicetune.engine.data import tiny
from slicetune.engine.export.audit import audit
from slicetune.engine.export.routed import fold, load_routed
from slicetune.engine.methods.landermt.routes import Routes
from slicetune.engine.methods.landermt.routing import router_of
from slicetune.engine.models import load as models

RECIPES = Path(__file__).parents[3] / "recipes"
SMALL = (
    "--data.pairs de-en en-de --data.seen it --data.score-sentences 4 --data.train-sentences 4",
    "--data.dev-sentences 2 --data.test-sentences 1 --evaluate.max-new-tokens 4",
    "--method.k 1 --train.learning-rate 0.01 --train.global-batch-size 4 --train.micro-batch-size 2",
    "--train.report-to --model.dtype float32",
)


def bloom(folder: Path) -> Path:
    model_of_bytes("bloom").save_pretrained(folder / "bloom")
    bytes_tokenizer(chat=False).save_pretrained(folder / "bloom")
    return folder / "bloom"


def baichuan2(folder: Path) -> Path:
    """Its tokenizer has pieces of the corpus's German and English."""
    with gzip.open(tiny.corpus_dir() / "de-en" / "it" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line)["translation"] for line in file]
    return lay_out(folder / "Baichuan2", train_pieces(folder, [row[c] for row in rows for c in ("de", "en")], **PLAIN))


@pytest.mark.parametrize("kind", [bloom, baichuan2], ids=lambda kind: kind.__name__)
def test_from_detection_to_a_folded_model(kind, pool, tmp_path, monkeypatch):
    """Two updates on two ranks; Baichuan2's folder is named as it is, and converted on the way."""
    recipe, out, cache = RECIPES / f"landermt_{kind.__name__}.py", tmp_path / "out", str(tmp_path / "cache")
    named = kind(tmp_path)
    flags = ["--out", str(out), "--model.path", str(named), "--data.dir", str(tiny.corpus_dir())]
    flags += " ".join(SMALL).split()
    results = pool.run("run_recipe", str(recipe), flags, cache)[0]
    monkeypatch.setenv("SLICETUNE_CACHE", cache)
    routes = Routes.load(out / "routes.safetensors")
    assert (routes.pairs, len(routes.layers)) == (("de-en", "en-de"), 1)
    for system in ("base", "landermt"):
        assert results["systems"][system]["domains"].keys() == {"de-en/it", "en-de/it"}
    assert not (named / "ran").exists()
    report = audit(Path(models.snapshot(str(named))), out)
    assert report.ok, str(report)
    assert 0 < sum(report.changed.values()) <= results["trainable_parameters"]
    folded_is_routed(out / "model", tmp_path)


def folded_is_routed(model: Path, folder: Path) -> None:
    """Each direction's folded model gives the routed one's logits."""
    ids = AutoTokenizer.from_pretrained(model)("Die Anlage", return_tensors="pt")["input_ids"]
    routed = load_routed(model)
    for pair in ("de-en", "en-de"):
        fold(model, pair, folder / pair)
        router_of(routed).set([pair])
        with torch.no_grad():
            folded = AutoModelForCausalLM.from_pretrained(folder / pair).eval()(ids).logits
            torch.testing.assert_close(routed.eval()(ids).logits, folded, rtol=1e-4, atol=1e-4)
