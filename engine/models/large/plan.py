"""How many ranks decode together, and how a layer is cut among them: by transformers' plan of the architecture."""

from __future__ import annotations

from typing import Any

AXES = {"colwise": 0, "colwise_gather_output": 0, "rowwise": 1, "rowwise_split_input": 1}
"""A plan's word for a layer → the axis of its weight [out, in] that is cut."""
WHOLE = ("replicated_with_grad_allreduce", "embedding_rowwise")
"""The words for what every rank has whole: norms, and embeddings, whose rows cost a look-up and no product."""


def together(config: Any, world: int, node: int) -> int:
    """How many ranks decode together: most of a node that can (of all, where a node has one rank); 1 where none can.

    `config` is a Hugging Face config, `node` the ranks of one machine. Attention heads, key heads and FFN units must
    divide evenly, and transformers must have a plan.
    """
    heads = getattr(config, "num_attention_heads", 1)
    sizes = heads, getattr(config, "num_key_value_heads", None) or heads, getattr(config, "intermediate_size", 1)
    return most(world, node, *sizes) if has_plan(config) else 1


def has_plan(config: Any) -> bool:
    """Whether transformers says how to cut the architecture, in words that are known here."""
    plan = getattr(config, "base_model_tp_plan", None) or {}
    return bool(plan) and set(plan.values()) <= {*AXES, *WHOLE}


def most(world: int, node: int, *sizes: int) -> int:
    """The most of `world` ranks among which each of `sizes` divides evenly; of one machine's, `node`, if two can be."""
    fits = [n for n in range(1, world + 1) if world % n == 0 and not any(size % n for size in sizes)]
    return max((n for n in fits if node % n == 0 and n > 1), default=max(fits))
