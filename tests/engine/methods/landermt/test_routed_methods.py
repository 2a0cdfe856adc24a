"""LANDeRMT, LS, LG and Layers: what each trains of the same routes, what its export changes, what audit holds it to."""

from __future__ import annotations

import json

import pytest
import torch
import toys
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from slicetune.engine.common.settings import as_dict
from slicetune.engine.export import delta
from slicetune.engine.export.audit import audit
from slicetune.engine.export.model import export_model
from slicetune.engine.export.routed import load_routed
from slicetune.engine.methods.landermt.patches import trained
from slicetune.engine.methods.landermt.routed import RoutedFFN
from slicetune.engine.methods.landermt.routes import GENERAL, NOBODY, ROUTES
from slicetune.engine.methods.landermt.routing import router_of
from slicetune.engine.methods.landermt.settings import Landermt, Layers, Lg, Ls
from slicetune.engine.slices.patches import load_masters

UNITS, WEIGHTS = 4 * toys.HIDDEN, 2 * toys.HIDDEN + 1  # of a toy BLOOM; a unit: row, bias entry, column
BLOCK = 12 * toys.HIDDEN**2 + 13 * toys.HIDDEN
METHODS = [Landermt(k=1), Landermt(k=1, attention=True), Ls(k=1, attention=True), Lg(k=1), Layers(k=1)]
NAMES = ["landermt", "with-attention", "ls", "lg", "layers"]


def one_layer():
    """Routes of the second of two layers, for three pairs; every unit somebody's but the last."""
    routes = toys.routes(UNITS)
    owner = torch.where(routes.owner == NOBODY, GENERAL, routes.owner)[1:].to(torch.int16)
    owner[:, -1] = NOBODY
    return toys.routes(UNITS, layers=(1,), takes=torch.ones(3, 1).bool(), owner=owner, share=routes.share[:, 1:])


@pytest.fixture(params=METHODS, ids=NAMES)
def run(request, tmp_path):
    """(method, routes, base folder, run folder, live model): the export of a made-up checkpoint."""
    method, routes = request.param, one_layer()
    toys.bloom().save_pretrained(tmp_path / "base")
    live = toys.bloom()
    config = toys.config(str(tmp_path), method=method, data_pairs=routes.pairs)
    method.prepare(live, routes, groups=routes.pairs)
    torch.manual_seed(2)
    tensors = {
        f"master/{n}": p.detach() + 0.1 * torch.randn_like(p) for n, p in live.named_parameters() if p.requires_grad
    }
    load_masters(live, tensors)
    export_model(tmp_path / "base", method.patches(tmp_path / "base", routes, tensors), tmp_path / "run" / "model")
    routes.save(tmp_path / "run" / ROUTES)
    if method.routed:
        trained(tmp_path / "base", routes, tensors).save(tmp_path / "run" / "model" / ROUTES)
    (tmp_path / "run" / "config.json").write_text(json.dumps(as_dict(config)))
    return method, routes, tmp_path / "base", tmp_path / "run", live


def test_what_is_trained_is_counted_saved_and_audited(run):
    method, routes, base, folder, live = run
    general, specific = int((routes.owner == GENERAL).sum()), int((routes.owner >= 0).sum())
    rest = BLOCK - UNITS * WEIGHTS
    expected = {
        "landermt": (general + specific) * WEIGHTS + rest * method.attention,
        "ls": specific * WEIGHTS,  # the blocks' rest is general, so LS does not train it
        "lg": general * WEIGHTS,
        "layers": BLOCK,
    }[method.kind]
    assert sum(p.numel() for p in live.parameters() if p.requires_grad) == expected
    report = audit(base, folder)
    assert report.ok, report
    assert sum(report.allowed.values()) == sum(report.changed.values()) == expected
    ids = torch.tensor([toys.examples(1)[0].input_ids])
    if method.routed:
        loaded = load_routed(folder / "model")
        router_of(live).set(["en-fr"])
        router_of(loaded).set(["en-fr"])
    else:
        loaded = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
        assert not any(isinstance(m, RoutedFFN) for m in live.modules())
    with torch.no_grad():
        assert (live(ids, use_cache=False).logits - loaded(ids, use_cache=False).logits).abs().max() < 1e-5


def test_audit_finds_what_the_method_may_not_change(run):
    _, _, base, folder, _ = run
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("h.0.mlp.dense_h_to_4h.weight"))
    tensors[name][3, 4] += 1
    save_file(tensors, path, {"format": "pt"})
    report = audit(base, folder)
    assert not report.ok
    assert [difference.count for difference in report.outside] == [1]


def test_a_delta_carries_slices_and_routes(tmp_path):
    """Base + slices + routes: what delta makes of the base is the run's routed model."""
    method, routes = Landermt(k=1), one_layer()
    toys.bloom().save_pretrained(tmp_path / "base")
    live = toys.bloom()
    method.prepare(live, routes, groups=routes.pairs)
    tensors = {f"master/{n}": p.detach() + 0.1 for n, p in live.named_parameters() if p.requires_grad}
    patches = method.patches(tmp_path / "base", routes, tensors)
    export_model(tmp_path / "base", patches, tmp_path / "model")
    routes.save(tmp_path / "model" / ROUTES)
    delta.write(tmp_path / "base", tmp_path / "model", patches, tmp_path / "delta")
    delta.apply(tmp_path / "base", tmp_path / "delta", tmp_path / "again")
    for name in ("model.safetensors", ROUTES):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    assert load_routed(tmp_path / "again") is not None


def test_a_run_of_one_pair_has_its_domains_for_groups(tmp_path):
    """--data.pair with several domains: all of them take the pair's route."""
    method, routes = Landermt(k=1), one_layer()
    model = toys.bloom()
    groups = toys.config(str(tmp_path), data_pair="en-fr", data_seen=("it", "law")).data.directions_of_groups
    method.prepare(model, routes, groups=groups)
    assert router_of(model).names([0, 1]) == {"en-fr"}
