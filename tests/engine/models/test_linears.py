"""What cannot train slices is refused before anything is changed: layers, weights, indices, FFNs of other forms."""

from __future__ import annotations

import copy

import pytest
import torch
import toys
import transformers
from torch import nn
from torch.nn.utils import parametrizations, prune

from slicetune.engine import ffn, slices
from slicetune.engine.common.errors import UserError
from slicetune.engine.models.sites import find_ffns

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "head_dim": 8,
}


class Scaled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Linear(4, 4)


def patched() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].forward = lambda x: x
    return model


REFUSED = {
    "subclass": (lambda: nn.Sequential(Scaled(4, 4)), "0", "a Scaled that is not used as an nn.Linear"),
    "patched": (patched, "0", "not used as an nn.Linear"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "out_proj", "not used as an nn.Linear"),
    "weight_norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))), "0", "made of others"),
    "pruned": (lambda: nn.Sequential(prune.random_unstructured(nn.Linear(4, 4), "weight", 1)), "0", "made of others"),
    "shared": (Twice, "first", "first: its weight is second's too"),
    "meta": (lambda: nn.Sequential(nn.Linear(4, 4, device="meta")), "0", "on the meta device"),
}


@pytest.mark.parametrize(("make", "name", "line"), REFUSED.values(), ids=REFUSED)
def test_a_layer_that_is_more_than_a_product_with_its_weight(make, name, line):
    model = make()
    before, frozen = list(model.modules()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(UserError, match=line):
        slices.slice_linears(model, rows={name: [1]})
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))
    assert [p.requires_grad for p in model.parameters()] == frozen


def test_tied_embeddings_are_no_layer_of_their_own():
    """The embedding would change with the head, a step later than it under most optimizers."""
    config = copy.deepcopy(toys.model().config)
    config.tie_word_embeddings = True
    with pytest.raises(UserError, match=r"lm_head: its weight is model\.embed_tokens's too"):
        slices.slice_linears(transformers.LlamaForCausalLM(config), rows={"lm_head": [3]})


@pytest.mark.parametrize("index", [[1.7], torch.tensor([False, True, True, False])], ids=["floats", "mask"])
def test_an_index_is_of_whole_numbers(index):
    with pytest.raises(UserError, match=r"0: row index is torch\.(float32|bool): give whole numbers"):
        slices.slice_linears(nn.Sequential(nn.Linear(4, 4)), rows={"0": index})


def quantised() -> nn.Module:
    model = toys.model()
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("make", "chosen", "line"),
    [
        (quantised, {"1.up.row": [3]}, r"layers\.1\.mlp\.up_proj: Linear of torch\.int8"),
        (
            toys.model,
            {"0.down.row": [1], "0.down.column": [2]},
            r"layers\.0\.mlp\.down_proj: .* rows and columns at once",
        ),
    ],
    ids=["quantised", "both"],
)
def test_a_refused_set_changes_nothing(make, chosen, line):
    model = make()
    before, frozen = list(model.modules()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(UserError, match=line):
        ffn.attach(model, toys.neurons(**chosen))
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))
    assert [p.requires_grad for p in model.parameters()] == frozen


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("SeedOss", SMALL | {"residual_dropout": 0.5}),
        ("Bloom", {"hidden_size": 32, "vocab_size": 64, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.1}),
    ],
)
def test_an_ffn_that_does_more_than_its_layers(kind, settings):
    """It has the names of a known one, which would stand in its place."""
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings))
    with pytest.raises(UserError, match="does more than its linear layers"):
        find_ffns(model)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Gemma2", "Mistral", "SeedOss", "Granite"])
def test_ffns_of_the_known_form(kind):
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SMALL))
    for module in model.modules():  # SeedOss has a dropout that is on by default
        if hasattr(module, "residual_dropout"):
            module.residual_dropout = 0.0
    state = torch.get_rng_state()
    assert len(find_ffns(model)) == 2
    assert torch.equal(torch.get_rng_state(), state)
