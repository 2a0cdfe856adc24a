"""How many parameters a method trains and adds, by arithmetic on a model's shape: what the dry run and tests know.

trainable(LLAMA31_8B, 0.01)                       # 1 % of the neurons: least, expected and most weights
low_rank(LLAMA31_8B, 8, linears(LLAMA31_8B))      # LoRA r=8 on the blocks: 20,971,520
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal

from ..models.shapes import ModelShape


@dataclass(frozen=True)
class Trainable:
    """Parameters that a method trains. `exact` is None until neurons.safetensors exists, where one selects.

    `neurons` is 0 where none are chosen; `added` counts parameters that the base model does not have.
    """

    neurons: int
    minimum: int
    expectation: float
    maximum: int
    exact: int | None = None
    added: int = 0

    @property
    def likely(self) -> int:
        """The exact number where it is known, else the expectation."""
        return round(self.expectation) if self.exact is None else self.exact

    @staticmethod
    def known(parameters: int, added: int = 0, neurons: int = 0) -> Trainable:
        """A number that needs no selection."""
        return Trainable(neurons, parameters, parameters, parameters, parameters, added)


def trainable(shape: ModelShape, ratio: float) -> Trainable:
    """Least, expected and most parameters of `ratio` of all neurons: a `down` row costs I weights, gate and up rows H.

    Halves of a neuron round up. The expectation is that of a uniformly random choice: count × mean cost, exactly.
    """
    count = math.floor(ratio * shape.neurons + 0.5)
    piles = sorted((shape.slice_weights[name], shape.layers * width) for name, width in shape.widths.items())
    mean = shape.ffn_parameters / shape.neurons_per_layer
    return Trainable(count, _cost(piles, count), count * mean, _cost(piles[::-1], count))


def _cost(piles: list[tuple[int, int]], count: int) -> int:
    """Weights of the first `count` neurons of (weights of a neuron, neurons) piles, in order."""
    weights = 0
    for cost, number in piles:
        taken = min(count, number)
        weights, count = weights + cost * taken, count - taken
    return weights


def unit_weights(shape: ModelShape) -> int:
    """Weights of one FFN unit: gate row, up row (their bias entries) and down column."""
    rows = (shape.slice_weights[name] for name in list(shape.widths)[:-1])
    return sum(rows) + shape.hidden


def linears(shape: ModelShape, attention: bool = True) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of a block's linear layers by name: its FFN's, and its attention's if that is asked for."""
    names = ("gate_proj", "up_proj", "down_proj") if shape.gated else ("dense_h_to_4h", "dense_4h_to_h")
    widths = [(shape.fan_in[role], width) for role, width in shape.widths.items()]
    ffn = dict(zip(names, widths, strict=True))
    if not attention:
        return ffn
    hidden, queries, keys = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if not shape.gated:  # BLOOM packs them
        return {"query_key_value": (hidden, queries + 2 * keys), "dense": (queries, hidden)} | ffn
    inward = {"q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys)}
    return inward | {"o_proj": (queries, hidden)} | ffn


ATTENTION_INPUTS = ("query_key_value", "q_proj", "k_proj", "v_proj")
FFN_INPUTS = ("gate_proj", "up_proj", "dense_h_to_4h")
FFN_OUTPUTS = ("down_proj", "dense_4h_to_h")
"""Linear layers by what they read: the normed residual stream of the attention, that of the FFN, or h."""


def frozen_values(shape: ModelShape) -> int:
    """Values a token that a frozen FFN saves: gate, act(gate) and up; BLOOM's GELU saves its input alone."""
    return (3 if shape.gated else 1) * shape.intermediate


def input_values(shape: ModelShape, trained: Iterable[str]) -> int:
    """Values a token that a block saves so that these linear layers get a gradient: what they read."""
    reads = {ATTENTION_INPUTS: shape.hidden, FFN_INPUTS: shape.hidden, FFN_OUTPUTS: shape.intermediate}
    return sum(width for names, width in reads.items() if not set(names).isdisjoint(trained))


def block_values(shape: ModelShape) -> int:
    """Values a token that a block saves whose weights are all trained, norms with their normalised input."""
    return input_values(shape, linears(shape)) + shape.gated * shape.norms * shape.hidden


def low_rank(shape: ModelShape, rank: int, names: Iterable[str], magnitude: bool = False) -> int:
    """LoRA's A [rank, inputs] and B [outputs, rank] on every such layer; DoRA's magnitude [outputs] besides."""
    layers = linears(shape)
    return shape.layers * sum(rank * sum(layers[name]) + magnitude * layers[name][1] for name in names)


def bottlenecks(shape: ModelShape, width: int) -> int:
    """Two adapters a block, each [width, H] and [H, width] with their biases."""
    return shape.layers * 2 * (2 * shape.hidden * width + width + shape.hidden)


def share_of(ratio: float, total: int) -> int:
    """ratio · total, halves rounded up, of the decimal number as it was written: 0.145 of 100 is 15."""
    return int((Decimal(repr(float(ratio))) * total).to_integral_value(ROUND_HALF_UP))
