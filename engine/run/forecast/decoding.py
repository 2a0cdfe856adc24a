"""Memory of one GPU while decoding: a whole model on each rank, one cut over several by tensor parallelism, or, where
that cannot be, ZeRO-3's parts, gathered block by block for every token (models/large).

Heads are not cut, so the ranks that share a model are as many as divide its heads: of 16 ranks and 8 key heads two
groups of 8. Next: memory_report.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ...models.large.plan import most
from ...models.shapes import ModelShape
from ..config import RunConfig
from .weights import Part, held, partitioned, passing, value_bytes

NODE = 8
"""GPUs of a machine, as far as a dry run knows."""


def tensor_ranks(config: RunConfig, shape: ModelShape, world: int) -> int:
    """Ranks of `world` that decode together; 1 where transformers has no plan, or the method's layers are its own."""
    if not shape.tensor_parallel or config.method.routed or (config.method.trains and not config.method.merges):
        return 1
    return most(world, min(world, NODE), shape.heads, shape.kv_heads, shape.intermediate)


def on_quantised(config: RunConfig) -> RunConfig:
    """The settings of what is decoded: the quantised base and what was trained beside it, or the whole export."""
    if config.model.quantize == "none" or config.evaluate.on != "full":
        return config
    model, evaluate = replace(config.model, quantize="none"), replace(config.evaluate, on="auto")
    return replace(config, model=model, evaluate=evaluate)


def decoding(config: RunConfig, shape: ModelShape, world: int) -> list[Part]:
    """Memory of one of `world` ranks while it decodes a batch of the longest prompts to the longest answers."""
    config = on_quantised(config)
    width, batch = value_bytes(config), config.evaluate.batch_size
    prompt, new = config.data.max_length, config.evaluate.max_new_tokens
    ranks = tensor_ranks(config, shape, world) if partitioned(config) else 1
    over, token = f" / {ranks} ranks" if ranks > 1 else "", shape.layers * 2 * shape.kv_heads * shape.head_dim * width
    values = 3 * shape.intermediate // ranks + 4 * shape.hidden
    return [
        *_weights(config, shape, world, ranks),
        Part(
            "keys and values",
            f"{batch} sentences × ({prompt:,} + {new:,} tokens) × {token:,} B{over}",
            batch * (prompt + new) * token // ranks,
        ),
        Part(
            "one block's values",
            f"{batch} sentences × {prompt:,} tokens × {values:,} × {width} B",
            batch * prompt * values * width,
        ),
        Part("logits", f"{batch} sentences × {shape.vocab:,} × 8 B (values, fp32 copy)", batch * shape.vocab * 8),
        *passing(config, shape, batch * prompt, backward=False),
    ]


def _weights(config: RunConfig, shape: ModelShape, world: int, ranks: int) -> Iterator[Part]:
    """What is trained is in the weights of the export; it lies beside those of a quantised base."""
    if ranks == 1:
        method = config.method
        quantised = config.model.quantize != "none" and method.trains
        beside = method.beside(method.bounds(shape)) if quantised else 0
        yield from held(config, shape, world if partitioned(config) else 0, beside)
        return
    width, embeddings = value_bytes(config), shape.vocab * shape.hidden
    cut = shape.parameters - embeddings
    formula = f"{cut:,} × {width} B / {ranks} ranks + {embeddings:,} (embeddings) × {width} B"
    yield Part("weights", formula, cut * width // ranks + embeddings * width)
