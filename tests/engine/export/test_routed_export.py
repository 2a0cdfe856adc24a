"""A routed model on disk: saved, loaded, decoded with mixed pairs, and folded to ordinary models that equal it."""

from __future__ import annotations

import pytest
import torch
import toys
from toys import bytes_tokenizer, model_of_bytes
from transformers import AutoModelForCausalLM

from slicetune.engine import commands
from slicetune.engine.common.errors import UserError
from slicetune.engine.data.prompts import Prompt
from slicetune.engine.data.records import Pair
from slicetune.engine.evaluation.translation import translate
from slicetune.engine.export import routed as fold
from slicetune.engine.export.model import export_model
from slicetune.engine.export.routed import load_routed
from slicetune.engine.methods.landermt.patches import patches, trained
from slicetune.engine.methods.landermt.routes import ROUTES, Routes
from slicetune.engine.methods.landermt.routing import attach, route, routed_ffns, router_of
from slicetune.engine.models.config import ModelConfig
from slicetune.engine.slices.patches import load_masters

UNITS = {"llama": toys.INTERMEDIATE, "bloom": 4 * toys.HIDDEN}
MAKE = {"llama": toys.model, "bloom": toys.bloom}


@pytest.fixture(params=[("llama", "input"), ("llama", "output"), ("bloom", "input"), ("bloom", "output")], ids=str)
def exported(request, tmp_path):
    """(folder, live model with trained slices, blocks' rest and shares, routes): the export of a made-up checkpoint."""
    kind, site = request.param
    routes, base, live = toys.routes(UNITS[kind], site=site, car="learned"), MAKE[kind](), MAKE[kind]()
    base.save_pretrained(tmp_path / "base")
    attach(live, routes, routes.pairs, attention=True)
    torch.manual_seed(5)
    tensors = {
        f"master/{name}": p.detach() + torch.randn_like(p) * 0.1
        for name, p in live.named_parameters()
        if p.requires_grad
    }
    load_masters(live, tensors)
    found = patches(tmp_path / "base", routes, tensors)
    assert sum(patch.axis is None for patch in found.values()) > 8  # attention and norms
    export_model(tmp_path / "base", found, tmp_path / "model")
    trained(tmp_path / "base", routes, tensors).save(tmp_path / "model" / ROUTES)
    return tmp_path / "model", live, routes


def logits(model, pairs=None):
    """Of one sentence a pair, as rows of a batch."""
    ids = torch.tensor([[(7 * i + 3 * row) % toys.VOCAB for i in range(9)] for row in range(3)])
    if pairs:
        router_of(model).set(pairs)
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def test_loaded_equals_what_was_trained(exported):
    folder, live, routes = exported
    loaded = load_routed(folder)
    want, got = logits(live, routes.pairs), logits(loaded, routes.pairs)
    assert (want - got).abs().max() < 1e-5
    assert (got - logits(AutoModelForCausalLM.from_pretrained(folder))).abs().max() > 1e-2  # every gain 1
    for pair in routes.pairs:  # a row of a mixed batch is what it is in a batch of its own pair
        row = routes.pairs.index(pair)
        assert (logits(loaded, [pair] * 3)[row] - got[row]).abs().max() < 1e-6
    shares = torch.stack([torch.cat([torch.sigmoid(p) for p in ffn.shares.values()]) for _, ffn in routed_ffns(live)])
    saved, takes = Routes.load(folder / ROUTES).share.t(), routes.takes.t()
    assert torch.equal(saved[takes], shares[takes])
    assert not torch.equal(saved, routes.share.t())


def test_folded_equals_routed(exported, tmp_path):
    folder, _, routes = exported
    loaded, folded = load_routed(folder), {}
    for pair in routes.pairs:
        out = tmp_path / f"of-{pair}"
        assert commands.main(["fold", str(folder), "--pair", pair, str(out)]) == 0
        folded[pair] = logits(AutoModelForCausalLM.from_pretrained(out).eval())
        assert (folded[pair] - logits(loaded, [pair] * 3)).abs().max() < 1e-5, pair
        assert not (out / ROUTES).exists()
    assert (folded["de-en"] - folded["en-fr"]).abs().max() > 1e-2


def test_folding_a_bfloat16_model_can_keep_float32(tmp_path):
    """A folded weight has more digits than bfloat16: at float32 the products alone are rounded."""
    toys.model(dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    toys.routes().save(tmp_path / "model" / ROUTES)
    routed = load_routed(tmp_path / "model", ModelConfig(dtype="float32"))
    worst = {}
    for dtype in ("auto", "float32"):
        fold.fold(tmp_path / "model", "en-de", tmp_path / dtype, dtype)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / dtype, dtype=torch.float32).eval()
        worst[dtype] = (logits(plain) - logits(routed, ["en-de"] * 3)).abs().max()
    assert worst["float32"] < 1e-5 < 1e-4 < worst["auto"]


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_decoding_mixed_pairs_equals_decoding_each_folded_model(kind, tmp_path):
    """Left-padded prompts of three directions in one batch, against an ordinary model a direction."""
    model, tokenizer, prompt = model_of_bytes(kind), bytes_tokenizer(False), Prompt(system="{src} to {tgt}.")
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    routes = toys.routes(48 if kind == "llama" else 128)
    routes.save(folder / ROUTES)
    texts = {"de-en": "Ja.", "en-de": "The rash fades.", "en-fr": "No, thanks."}
    pairs = [Pair(text, "-", "it", n, tuple(pair.split("-"))) for n, (pair, text) in enumerate(texts.items())]
    mixed = translate(load_routed(folder), tokenizer, prompt, pairs, 3, 12)
    for pair, line in zip(pairs, mixed, strict=True):
        name = "-".join(pair.languages)
        fold.fold(folder, name, tmp_path / name)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        assert translate(plain, tokenizer, prompt, [pair], 1, 12) == [line]
    assert mixed != translate(model, tokenizer, prompt, pairs, 3, 12)
    other = [Pair("Ciao.", "-", "it", 1, ("it", "en"))]
    with pytest.raises(UserError, match="no route for it-en"):
        translate(load_routed(folder), tokenizer, prompt, other, 1, 4)


def test_what_cannot_be_folded_is_one_line(tmp_path, capsys):
    toys.model().save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=f"no {ROUTES} in it"):
        load_routed(tmp_path / "model")
    with pytest.raises(SystemExit, match="2"):
        commands.main(["fold", str(tmp_path / "model"), "--pair", "de-en", str(tmp_path / "out")])
    toys.routes().save(tmp_path / "model" / ROUTES)
    with pytest.raises(SystemExit, match="2"):
        commands.main(["fold", str(tmp_path / "model"), "--pair", "it-en", str(tmp_path / "out")])
    lines = capsys.readouterr().err.splitlines()
    assert "no such file" in lines[0]
    assert "'it-en' has no route" in lines[1]


def test_routes_alone_change_nothing_that_is_stored():
    model, routes = toys.model(), toys.routes()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    route(model, routes)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
