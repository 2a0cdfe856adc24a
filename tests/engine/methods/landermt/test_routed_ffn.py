"""The routed FFN against a plain masked and scaled one in float64, forward and backward, in batches that mix pairs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import toys

from slicetune.engine.common.errors import UserError
from slicetune.engine.data.batching import pack, pad
from slicetune.engine.methods.landermt.owned import OwnedLinear
from slicetune.engine.methods.landermt.routed import Router
from slicetune.engine.methods.landermt.routing import attach, owned_units, route, routed_ffns, router_of

LENGTHS, PAIRS = (5, 3, 7, 4), ("en-fr", "de-en", "en-de", "en-fr")
MODELS = {"llama": (toys.model, toys.INTERMEDIATE), "bloom": (toys.bloom, 4 * toys.HIDDEN)}


def plain(ffn, x, c, site):
    """The FFN in plain torch with the gain c [tokens, I]; `ffn` is Hugging Face's own module."""
    if hasattr(ffn, "gate_proj"):
        g, u = ffn.gate_proj(x), ffn.up_proj(x)
        h = F.silu(c * g) * (c * u) if site == "input" else c * F.silu(g) * u
        return ffn.down_proj(torch.where(c == 0, 0, h))
    first, last = ffn.dense_h_to_4h, ffn.dense_4h_to_h
    a = F.linear(x, first.weight)
    z = c * a + first.bias if site == "input" else a + first.bias
    h = F.gelu(z, approximate="tanh")
    return last(torch.where(c == 0, 0, h if site == "input" else c * h))


def block_ffn(model, layer):
    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    return blocks[layer].mlp


def inputs(dtype=torch.float64):
    torch.manual_seed(3)
    x = torch.randn(1, sum(LENGTHS), toys.HIDDEN, dtype=dtype)
    return x, torch.randn_like(x), [pair for pair, n in zip(PAIRS, LENGTHS, strict=True) for _ in range(n)]


def call(ffn, x):
    return ffn(x, torch.zeros_like(x)) if "in" in ffn.roles else ffn(x)


@pytest.fixture(params=[(m, s, l) for m in MODELS for s in ("input", "output") for l in (0, 1)], ids=str)
def case(request):
    """(float64 reference model, its routed and sliced copy, routes, layer)."""
    kind, site, layer = request.param
    make, units = MODELS[kind]
    routes = toys.routes(units, site=site)
    model = make(dtype=torch.float64)
    routed = copy.deepcopy(model)
    attach(routed, routes, routes.pairs)
    return model, routed, routes, layer


def test_forward_and_backward_equal_the_plain_ffn(case):
    model, routed, routes, layer = case
    x, dy, pairs = inputs()
    names = list(routes.pairs)
    rows = torch.tensor([names.index(pair) for pair in pairs])
    c = routes.gains(layer)[rows].double()
    reference = block_ffn(model, layer).requires_grad_(True)
    ours = block_ffn(routed, layer)
    router_of(routed).rows = rows[None]

    want_x, got_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    want, got = plain(reference, want_x, c, routes.site), call(ours, got_x)
    assert (want - got).abs().max() < 1e-12
    got.backward(dy)
    # Of a pair that leaves the layer alone nothing reaches the slices, though its input has a gradient.
    kept = routes.takes[rows, layer].double()[None, :, None]
    (dx,) = torch.autograd.grad(want, want_x, dy, retain_graph=True)
    assert (dx - got_x.grad).abs().max() < 1e-12
    params = dict(reference.named_parameters())
    weights = [name for name in params if "dense_4h_to_h.bias" not in name]
    grads = torch.autograd.grad(plain(reference, x, c, routes.site) * kept, [params[n] for n in weights], dy)
    expected = dict(zip(weights, grads, strict=True))

    seen = 0
    for role, child in ours.roles.items():
        linear = getattr(ours, child)
        for owner, (units, _) in owned_units(routes, layer).items():
            seen += 1
            if role in ("down", "out"):
                assert (linear.columns[owner].grad - expected[f"{child}.weight"][:, units].t()).abs().max() < 1e-12
            else:
                assert (linear.rows[owner].grad - expected[f"{child}.weight"][units]).abs().max() < 1e-12
            if linear.bias_rows:
                assert (linear.bias_rows[owner].grad - expected[f"{child}.bias"][units]).abs().max() < 1e-12
    assert seen == len(ours.roles) * 4  # general and three languages


@pytest.mark.parametrize("kind", MODELS)
def test_all_units_owned_give_the_gradient_of_some(kind):
    """Nobody's units given to `general`: the product is of the whole layer, not of gathered columns."""
    make, units = MODELS[kind]
    routes = toys.routes(units)
    owner = torch.where(routes.owner < 0, -1, routes.owner).to(torch.int16)
    routes = toys.routes(units, owner=owner)
    model = make(dtype=torch.float64)
    whole, parts = copy.deepcopy(model), copy.deepcopy(model)
    attach(whole, routes, routes.pairs)
    attach(parts, routes, routes.pairs, trains="specific")
    assert block_ffn(whole, 1).linears()[0].index is None
    assert block_ffn(parts, 1).linears()[0].index is not None
    x, dy, pairs = inputs()
    for m in (whole, parts):
        router_of(m).set(pairs)
        router_of(m).rows = router_of(m).rows.t()
        call(block_ffn(m, 1), x).backward(dy)
    of_whole = {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}
    of_parts = {n: p.grad for n, p in parts.named_parameters() if p.grad is not None}
    assert {n for n in of_whole if "general" not in n} == set(of_parts)
    assert all((of_whole[n] - grad).abs().max() < 1e-12 for n, grad in of_parts.items())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("site", ["input", "output"])
def test_learned_shares_have_the_gradient_of_autograd(kind, site):
    make, units = MODELS[kind]
    routes = toys.routes(units, car="learned", site=site)
    model = make(dtype=torch.float64)
    routed = copy.deepcopy(model)
    attach(routed, routes, routes.pairs)
    x, dy, pairs = inputs()
    rows = torch.tensor([routes.pairs.index(pair) for pair in pairs])
    router_of(routed).rows = rows[None]
    for layer in (0, 1):
        logits = torch.logit(routes.share[:, layer].double()).requires_grad_()
        low, high = routes.gains(layer, torch.zeros(3)).double(), routes.gains(layer, torch.ones(3)).double()
        c = (low + torch.sigmoid(logits)[:, None] * (high - low))[rows]
        want = plain(block_ffn(model, layer), x, c, site)
        ours = block_ffn(routed, layer)
        got = call(ours, x)
        assert (want - got).abs().max() < 1e-6  # the start is stored in float32
        (grad,) = torch.autograd.grad(want, logits, dy)
        got.backward(dy)
        shares = {pair: p.grad for pair, p in ours.shares.items() if p.requires_grad}
        assert set(shares) == {p for p, takes in zip(routes.pairs, routes.takes[:, layer], strict=True) if takes}
        for pair, found in shares.items():
            expected = grad[routes.pairs.index(pair)]
            assert expected.abs() > 1e-3
            assert (found - expected).abs() < 1e-5 * expected.abs(), pair


@pytest.mark.parametrize("kind", MODELS)
def test_recompute_changes_no_bit(kind):
    make, units = MODELS[kind]
    grads = []
    for recompute in (False, True):
        model, routes = make(), toys.routes(units)
        attach(model, routes, routes.pairs, recompute=recompute)
        x, dy, pairs = inputs(torch.float32)
        router_of(model).rows = torch.tensor([[routes.pairs.index(pair) for pair in pairs]])
        call(block_ffn(model, 0), x).backward(dy)
        grads.append([p.grad for p in block_ffn(model, 0).parameters() if p.grad is not None])
    assert len(grads[0]) > 8
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_gain_one_is_the_model_itself():
    """car none, nobody left out: a routed model of one pair is the model."""
    routes = toys.routes(owner=torch.full((2, toys.INTERMEDIATE), -1, dtype=torch.int16), car="none")
    model, routed = toys.model(), toys.model()
    route(routed, routes).set(["en-de"])
    ids = torch.tensor([toys.examples(1)[0].input_ids])
    assert (model(ids).logits - routed(ids).logits).abs().max() < 1e-6


@pytest.mark.parametrize("kind", MODELS)
def test_the_model_may_add_to_the_output_in_place(kind):
    """Falcon does, in a block without a residual argument."""
    make, units = MODELS[kind]
    model = make()
    routes = toys.routes(units)
    attach(model, routes, routes.pairs)
    x, _, _ = inputs(torch.float32)
    router_of(model).rows = torch.zeros(x.shape[:2], dtype=torch.int64)
    y = block_ffn(model, 0)(x.requires_grad_())
    y += x
    y.sum().backward()
    assert x.grad.abs().sum() > 0


def test_the_router_reads_packed_and_padded_batches():
    examples = toys.examples(4, groups=3)
    lengths = [len(e.input_ids) for e in examples]
    router = Router(("x-y", "a-b", "b-a", "c-d"), ("b-a", "x-y", "c-d"))
    want = [row for e, n in zip(examples, lengths, strict=True) for row in [(2, 0, 3)[e.group]] * n]
    router.read(pack(examples))
    assert router.of(torch.zeros(1, sum(lengths), 8)).tolist() == want
    batch = pad(examples, 0)
    router.read(batch)
    rows = router.of(torch.zeros(4, batch.input_ids.shape[1], 8)).view(4, -1)
    assert rows[:, 0].tolist() == [(2, 0, 3)[e.group] for e in examples]
    assert (rows == rows[:, :1]).all()
    assert router.names([0, 2]) == {"b-a", "c-d"}


def test_the_rest_of_a_block_trains_for_pairs_that_take_it():
    """de-en leaves layer 1 alone: its attention and norms get no gradient there, those of layer 0 do."""
    for pair, trained in (("de-en", {0}), ("en-fr", {0, 1})):
        model, routes = toys.model(), toys.routes()
        attach(model, routes, routes.pairs, attention=True)
        router_of(model).set([pair])
        model(torch.tensor([toys.examples(1)[0].input_ids])).logits.square().mean().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert not [name for name, grad in grads.items() if grad is None and ".rows." not in name]
        for layer in (0, 1):
            rest = [g for n, g in grads.items() if f"layers.{layer}." in n and ".mlp." not in n]
            assert len(rest) == 6
            assert all(bool(grad.any()) == (layer in trained) for grad in rest)


def test_a_model_can_be_routed_again():
    routes, ids = toys.routes(), torch.tensor([toys.examples(1)[0].input_ids])
    some = toys.routes(layers=(1,), takes=routes.takes[:, 1:], owner=routes.owner[1:], share=routes.share[:, 1:])
    once, twice = toys.model(), toys.model()
    route(twice, routes)
    route(twice, some).set(["en-fr"])
    route(once, some).set(["en-fr"])
    assert (once(ids).logits - twice(ids).logits).abs().max() < 1e-6
    assert [name for name, _ in routed_ffns(twice)] == ["model.layers.1.mlp"]


def test_what_cannot_be_routed_is_refused():
    with pytest.raises(UserError, match="no route for en-it"):
        Router(("de-en",), ("de-en", "en-it"))
    with pytest.raises(UserError, match="no route for en-it"):
        Router(("de-en",)).set(["en-it"])
    with pytest.raises(UserError, match="48 units"):
        route(toys.bloom(), toys.routes())
    with pytest.raises(UserError, match="of 3 layers"):
        route(toys.model(), toys.routes(total_layers=3))
    with pytest.raises(UserError, match="duplicates"):
        OwnedLinear(torch.nn.Linear(4, 4), 0, {"a": torch.tensor([1, 2]), "b": torch.tensor([2])})


def test_other_layers_stay_as_they_are():
    routes = toys.routes()
    one = toys.routes(layers=(1,), takes=routes.takes[:, 1:], owner=routes.owner[1:], share=routes.share[:, 1:])
    model = toys.model()
    before = block_ffn(model, 0)
    attach(model, one, one.pairs)
    assert block_ffn(model, 0) is before
    assert [name for name, _ in routed_ffns(model)] == ["model.layers.1.mlp"]
    assert all("layers.1.mlp" in name for name, p in model.named_parameters() if p.requires_grad)
