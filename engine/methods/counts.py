"""How many parameters a method trains and adds, by arithmetic on a model's shape: what the dry run and tests know.

shape = known("Llama-3.1-8B")
trainable(shape, 0.01)                  # 1 % of the neurons: least, expected and most weights
low_rank(shape, 8, linears(shape))      # LoRA r=8 on the blocks: 20,971,520
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal

from ..common.errors import UserError
from ..models.shapes import ModelShape
from ..models.sites import attention_output, no_output


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
    """(inputs, outputs) of a block's linear layers by name: its FFN's, and its attention's if that is asked for.

    The name is the last part of the layer's own where no other layer of the block has it too.
    """
    short = Counter(x.name.rpartition(".")[2] for x in shape.linears)
    of = {x: x.name if short[x.name.rpartition(".")[2]] > 1 else x.name.rpartition(".")[2] for x in shape.linears}
    return {of[x]: (x.inputs, x.outputs) for x in shape.linears if attention or x.name in shape.ffn}


def reads_hidden(shape: ModelShape, name: str) -> bool:
    """Whether a layer of the block reads the normed residual stream: it is no output projection."""
    others = shape.ffn[-1], attention_output([x.name for x in shape.linears], shape.ffn)
    return not any(named(other, name) for other in others if other)


def needs_output(shape: ModelShape, title: str) -> None:
    """Raises UserError for a block in which the attention's output projection cannot be told from other layers."""
    if not attention_output([x.name for x in shape.linears], shape.ffn):
        raise UserError(no_output(shape.name, [x.name for x in shape.linears], shape.ffn, title))


def attention_inputs(shape: ModelShape) -> list[str]:
    """Names of the block's layers outside of the FFN that read the residual stream: q, k and v, or one of all three."""
    outside = [name for name in linears(shape) if not any(named(full, name) for full in shape.ffn)]
    return [name for name in outside if reads_hidden(shape, name)]


def named(full: str, name: str) -> bool:
    """Whether `name` is a layer's full name in the block, or the last part of it."""
    return name in (full, full.rpartition(".")[2])


def frozen_values(shape: ModelShape) -> int:
    """Values a token that a frozen FFN saves: gate, act(gate) and up; a plain one that input alone."""
    return (3 if shape.gated else 1) * shape.intermediate


def input_values(shape: ModelShape, trained: Iterable[str]) -> int:
    """Values a token that a block saves so that these linear layers get a gradient: what they read.

    The normed residual stream of the attention, that of the FFN, and h; what the attention's output projection reads is
    saved anyway.
    """
    trained, ffn = list(trained), shape.ffn
    of_ffn = [name for name in trained if any(named(full, name) for full in ffn[:-1])]
    of_attention = [name for name in trained if name not in of_ffn and reads_hidden(shape, name)]
    last = any(named(ffn[-1], name) for name in trained)
    return shape.hidden * (bool(of_ffn) + bool(of_attention)) + shape.intermediate * last


def block_values(shape: ModelShape) -> int:
    """Values a token that a block saves whose weights are all trained, norms with their normalised input."""
    return input_values(shape, linears(shape)) + shape.norm_in_fp32 * shape.norms * shape.hidden


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
