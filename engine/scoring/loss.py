"""Cross-entropy of target tokens, with logits computed at their positions only, a chunk of them at a time.

Next: cross_entropy.py, the chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..data.batching import Batch
from ..models.attention import inputs_of
from ..models.logits import logit_rule
from .cross_entropy import token_losses


def target_losses(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy [L] in float32 of every target token of a packed or padded batch, in `batch.target`'s order.

    `model` is a causal LM, or a ZeroEngine around one: DeepSpeed wants its own forward, which is that of `Losses`.
    """
    return _losses(model, batch) if isinstance(model, nn.Module) else model(batch)


class Losses(nn.Module):
    """A causal LM whose forward gives the losses of `target_losses`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.training = model, model.training

    def forward(self, batch: Batch) -> Tensor:
        return _losses(self.model, batch)


def _losses(model: nn.Module, batch: Batch) -> Tensor:
    hidden = model.base_model(**inputs_of(model, batch)).last_hidden_state.flatten(0, 1)[batch.predict]
    head, (scale, cap) = model.get_output_embeddings(), logit_rule(model)
    bias = head.bias
    if scale != 1:  # Cohere, Granite: exact for a power of two, which theirs are
        hidden, bias = hidden * scale, None if bias is None else bias * scale
    # The head is called as a module, so that hooks see it: ZeRO-3 gathers its weight around the call and its backward.
    head.forward = lambda hidden: token_losses(hidden, head.weight, bias, batch.target, cap)
    try:
        return head(hidden).float()
    finally:
        del head.forward


def sample_means(losses: Tensor, batch: Batch) -> Tensor:
    """Mean loss [samples] of each sample's target tokens."""
    samples = len(batch.groups)
    zeros = torch.zeros(samples, dtype=losses.dtype, device=losses.device)
    begin, end = batch.target_segments.unbind(1)  # bincount would make the host wait for the device
    return zeros.index_add(0, batch.target_sample, losses) / (end - begin)


def token_weights(batch: Batch) -> Tensor:
    """Weight [L] of every target token: its sample's (0 for a sentence that only fills a rank's share)."""
    return batch.weight[batch.target_sample]
