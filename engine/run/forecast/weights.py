"""Bytes of a model's weights on one GPU, plain or quantised, and what passes through a quantised layer.

    8B in nf4: 6,979,321,856 × (1/2 + 1/64 + 4/16,384) B + 1,050,939,392 × 2 B = 5.7 GB

--model.quantize holds the linear layers of the blocks alone; embeddings, output head, norms and biases keep the model's
dtype. Next: memory.py, what scoring and training hold besides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ...models.shapes import Linear, ModelShape
from ..config import RunConfig

USABLE = 0.95
"""Share of a GPU's memory that a run can count on."""
BLOCK, NESTED = 64, 256
"""nf4: a scale of 1 B for 64 weights, and a scale of 4 B for 256 of those scales (double quantisation)."""


@dataclass(frozen=True)
class Part:
    """One line of a memory table; `formula` is the product that `bytes` is."""

    name: str
    formula: str
    bytes: int
    host: bool = False


def device_total(parts: list[Part]) -> int:
    """Bytes on the GPU."""
    return sum(part.bytes for part in parts if not part.host)


def value_bytes(config: RunConfig) -> int:
    """Bytes of a weight or activation on a GPU, where `auto` is bfloat16."""
    return 4 if config.model.dtype == "float32" else 2


def partitioned(config: RunConfig) -> bool:
    """Whether each rank holds its share of the weights alone."""
    return config.model.partition == "on"


def over(ranks: int) -> str:
    """What a formula says of a product that is divided."""
    return f" / {ranks} ranks" if ranks > 1 else ""


def quantised_bytes(kind: str, linear: Linear) -> int:
    """Bytes of one linear layer's weight in `nf4`, `int8` or `fp8`, its scales included."""
    weights = linear.inputs * linear.outputs
    if kind == "nf4":
        scales = math.ceil(weights / BLOCK)
        return math.ceil(weights / 2) + scales + 4 * math.ceil(scales / NESTED)
    return weights + 4 * linear.outputs


def held(
    config: RunConfig, shape: ModelShape, ranks: int = 0, beside: int = 0, name: str = "weights"
) -> Iterator[Part]:
    """The weights that a rank holds, `beside` of them not the base's; and what is gathered of those that are cut up.

    `ranks` are those among which they are cut up; 0: each rank holds the whole model, as it does a quantised one.
    """
    width, kind = value_bytes(config), config.model.quantize
    if kind == "none":
        total = f"({shape.parameters:,} + {beside:,})" if beside else f"{shape.parameters:,}"
        yield Part(name, f"{total} × {width} B{over(ranks)}", (shape.parameters + beside) * width // max(1, ranks))
        if ranks:
            yield gathered(config, shape)
        return
    weights = shape.layers * sum(one.inputs * one.outputs for one in shape.linears)
    rows, rest = shape.layers * sum(one.outputs for one in shape.linears), shape.parameters - weights + beside
    each = f"{weights:,} × (1/2 + 1/{BLOCK} + 4/{BLOCK * NESTED:,}) B" if kind == "nf4" else ""
    each = each or f"{weights:,} × 1 B + {rows:,} rows × 4 B"
    size = shape.layers * sum(quantised_bytes(kind, one) for one in shape.linears) + rest * width
    yield Part(f"{name}, {kind}", f"{each} + {rest:,} others × {width} B", size)


def gathered(config: RunConfig, shape: ModelShape) -> Part:
    """Whole weights for a moment: of a block, of the next one that is fetched ahead, of the embeddings or the head."""
    width, blocks, head = value_bytes(config), min(2, shape.layers), shape.vocab * shape.hidden
    formula = f"({blocks} × {shape.block_parameters:,} (a block, and one ahead) + {head:,} (output head)) × {width} B"
    return Part("gathered weights", formula, (blocks * shape.block_parameters + head) * width)


def passing(config: RunConfig, shape: ModelShape, tokens: int, backward: bool = True) -> Iterator[Part]:
    """What the largest quantised layer holds for a moment: its weight, dequantised. In fp8 what quantises `tokens`:
    fp32 quotients and their e4m3 forward; in the `backward` also dy in fp32, and the weight transposed.
    """
    kind, largest = config.model.quantize, max(shape.linears, key=lambda one: one.inputs * one.outputs)
    size, product = largest.inputs * largest.outputs, f"{largest.inputs:,} × {largest.outputs:,}"
    if kind in ("nf4", "int8"):
        width = 8 if kind == "int8" else value_bytes(config)  # bitsandbytes multiplies an int8 weight twice, in fp32
        yield Part("a dequantised weight", f"{product} × {width} B ({largest.name})", size * width)
    if kind == "fp8":
        wide = max(max(one.inputs, one.outputs) for one in shape.linears)
        width, size = (9, size) if backward else (5, 0)
        formula = f"{tokens:,} tokens × ({wide:,} × {width} B + 4 B)"
        formula += f" + {product} × 1 B ({largest.name}, transposed)" * backward
        yield Part("fp8 copies", formula, tokens * (wide * width + 4) + size)
