"""What an FFN computes is found out by running it: one that is more than its layers is never taken for one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Phi3Config, Phi3ForCausalLM

from slicetune.engine import ffn
from slicetune.engine.common.errors import UserError
from slicetune.engine.models.probe import probe
from slicetune.engine.slices.neurons import NeuronSet

HIDDEN, UNITS = 6, 10


class Gated(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(HIDDEN, UNITS, bias=bias), nn.Linear(HIDDEN, UNITS, bias=bias)
        self.c = nn.Linear(UNITS, HIDDEN, bias=bias)

    def forward(self, x):
        return self.c(F.silu(self.a(x)) * self.b(x))


class ActsOnSecond(Gated):
    def forward(self, x):
        return self.c(self.a(x) * F.silu(self.b(x)))


class Packed(nn.Module):
    def __init__(self, halves) -> None:
        super().__init__()
        self.both, self.c, self.halves = nn.Linear(HIDDEN, 2 * UNITS), nn.Linear(UNITS, HIDDEN), halves

    def forward(self, x):
        gate, up = self.halves(self.both(x))
        return self.c(F.silu(gate) * up)


class Scaled(Gated):
    def forward(self, x):
        return super().forward(x) * 0.5


class Residual(Gated):
    def forward(self, x):
        return super().forward(x) + x


class Dropout(Gated):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.1, training=self.training)


class Clamped(Gated):
    """At a limit that only large values reach."""

    def forward(self, x):
        return self.c(F.silu(self.a(x)).clamp(max=100.0) * self.b(x))


class Factor(Gated):
    """A weight that has no effect yet."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return super().forward(x) * self.alpha


class Norm(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x):
        return super().forward(self.norm(x))


def test_the_layers_that_the_activation_and_the_product_take_are_told_apart():
    assert probe(Gated(), "ffn").projections == {"gate": "a", "up": "b", "down": "c"}
    assert probe(ActsOnSecond(bias=True), "ffn").projections == {"gate": "b", "up": "a", "down": "c"}
    packed = Packed(lambda y: y.chunk(2, -1))
    assert probe(packed, "ffn").projections == {"gate": "both", "up": "both", "down": "c"}


@pytest.mark.parametrize("module", [Scaled(), Residual(), Dropout(), Clamped(), Factor(), Norm()], ids=repr)
def test_what_is_more_than_its_layers_is_refused(module):
    with pytest.raises(UserError, match=r"(more than|beside) its linear layers"):
        probe(module.eval(), "ffn")


@pytest.mark.parametrize("halves", [lambda y: y.chunk(2, -1)[::-1], lambda y: (y[..., ::2], y[..., 1::2])])
def test_a_packed_layer_in_another_order_is_refused(halves):
    with pytest.raises(UserError, match="more than its linear layers"):
        probe(Packed(halves), "ffn")


def test_the_forward_that_was_put_on_an_instance_counts():
    module = Gated()
    module.forward = ActsOnSecond.forward.__get__(module)
    assert probe(module, "ffn").projections == {"gate": "b", "up": "a", "down": "c"}
    module.forward = Scaled.forward.__get__(module)  # cannot run on it: its super() is not this class's
    with pytest.raises(UserError, match=r"ffn: its forward was replaced .* attach the neurons first"):
        probe(module, "ffn")
    module.forward = lambda x: x
    with pytest.raises(UserError, match="its forward was replaced"):
        probe(module, "ffn")


def phi3() -> tuple[nn.Module, NeuronSet]:
    config = Phi3Config(
        hidden_size=HIDDEN * 2, intermediate_size=UNITS, num_hidden_layers=1, num_attention_heads=2, vocab_size=16
    )
    config.pad_token_id = None
    widths, fan_in = {"gate": UNITS, "up": UNITS, "down": 12}, {"gate": 12, "up": 12, "down": UNITS}
    return Phi3ForCausalLM(config), NeuronSet({(0, "up", "row"): torch.tensor([3])}, 1, widths, fan_in)


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def test_a_layer_beside_the_chosen_ones_must_be_a_product_too():
    model, chosen = phi3()
    model.model.layers[0].mlp.down_proj = Doubled(UNITS, HIDDEN * 2, bias=False)
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.down_proj: a Doubled that is not used as an nn\.Linear"):
        ffn.attach(model, chosen)
