"""Memory of one GPU while decoding: a whole model on each rank, or one cut over several by tensor parallelism.

transformers' plans cut a block's linear layers, the output head and the embeddings; 5.17 leaves the embeddings whole
where they are not the head, and so they are counted. Heads are not cut, so the ranks that share a model are as many as
divide its heads: of 16 ranks and 8 key heads two groups of 8. Next: memory_report.py.
"""

from __future__ import annotations

import math

from ...models.shapes import ModelShape
from ..config import RunConfig
from .memory import Part, partitioned, value_bytes


def tensor_ranks(shape: ModelShape, world: int) -> int:
    """Ranks of `world` that share one model while decoding; 1 where transformers has no plan to cut it."""
    return math.gcd(world, shape.heads, shape.kv_heads) if shape.tensor_parallel else 1


def decoding(config: RunConfig, shape: ModelShape, world: int) -> list[Part]:
    """Memory of one of `world` ranks while it decodes a batch of the longest prompts to the longest answers."""
    width, batch = value_bytes(config), config.evaluate.batch_size
    prompt, new = config.data.max_length, config.evaluate.max_new_tokens
    ranks = tensor_ranks(shape, world) if partitioned(config) else 1
    over, token = f" / {ranks} ranks" if ranks > 1 else "", shape.layers * 2 * shape.kv_heads * shape.head_dim * width
    values = 3 * shape.intermediate // ranks + 4 * shape.hidden
    return [
        _weights(shape, width, ranks),
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
    ]


def _weights(shape: ModelShape, width: int, ranks: int) -> Part:
    if ranks == 1:
        return Part("weights", f"{shape.parameters:,} × {width} B", shape.parameters * width)
    whole = 0 if shape.tied else shape.vocab * shape.hidden
    cut = shape.parameters - whole
    formula = f"{cut:,} × {width} B / {ranks} ranks" + (f" + {whole:,} (embeddings) × {width} B" if whole else "")
    return Part("weights", formula, cut * width // ranks + whole * width)
