"""Decoder blocks compiled by torch.compile, for training: norms, RoPE, residuals and activations become few kernels.

Each block is compiled as a whole, for batches of any length; blocks that are alike share what was compiled. Scoring,
dev loss and decoding run as ever. See slices/traced.py, the FFN as a compiler sees it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..common.errors import UserError
from ..common.private import allow_variants, recompute_cheap_values
from ..slices.linear import SliceLinear
from ..slices.traced import Slices

VARIANTS = 4
"""Compiled versions a block may need: of packed and padded batches, with and without a gradient at its input."""


def compile_blocks(model: nn.Module, backend: str = "inductor") -> int:
    """Compile every decoder block of `model`, in place, for its training; returns their number.

    Weights must stay where they are between forward and backward, which ZeRO-3 and FSDP do not grant. Raises UserError
    for a model without blocks.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise UserError(f"--model.compile blocks: {type(model).__name__} has no decoder blocks that are known: use off")
    allow_variants(VARIANTS * len(blocks))
    recompute_cheap_values()
    for block in blocks:
        block.forward = _training_forward(block, backend)
    return len(blocks)


def _training_forward(block: nn.Module, backend: str) -> Callable[..., Any]:
    """The block's forward: compiled in training mode, else as it is. Its hooks, ZeRO's among them, run around it."""
    plain = block.forward
    compiled = torch.compile(plain, dynamic=True, backend=backend)
    layers = [module for module in block.modules() if isinstance(module, SliceLinear)]

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return plain(*args, **kwargs)
        for layer in layers:
            layer.before_forward()  # not in the graph, which would write a copy of the whole weight
            layer.for_compiler = Slices.of(layer)
        try:
            return compiled(*args, **kwargs)
        finally:
            for layer in layers:
                del layer.for_compiler

    return forward
