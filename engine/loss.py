"""Cross-entropy of target tokens, with logits computed at their positions only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batching import Batch


def target_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy [L] in float32 of every target token of a packed or padded batch, in `batch.target`'s order.

    Packed rows carry position_ids that restart and no mask: transformers builds the block-diagonal mask itself, which
    it does only without a cache.
    """
    if batch.position_ids is not None:
        logits = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=batch.predict,
        ).logits[0]
    elif isinstance(model, nn.Module):
        logits = _padded_logits(model, batch)
    else:  # a DeepSpeed engine wants its own forward
        full = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        logits = full.flatten(0, 1)[batch.predict]
    return F.cross_entropy(logits.float(), batch.target, reduction="none")


def _padded_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits [L, vocabulary] at the label positions of a padded batch (`logits_to_keep` cannot name them by row)."""
    hidden = model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    logits = model.get_output_embeddings()(hidden.last_hidden_state.flatten(0, 1)[batch.predict])
    cap = getattr(model.config, "final_logit_softcapping", None)  # Gemma-2
    return logits if cap is None else torch.tanh(logits / cap) * cap


def sample_means(losses: Tensor, batch: Batch) -> Tensor:
    """Mean loss [samples] of each sample's target tokens."""
    samples = len(batch.groups)
    zeros = torch.zeros(samples, dtype=losses.dtype, device=losses.device)
    begin, end = batch.target_segments.unbind(1)  # bincount would make the host wait for the device
    return zeros.index_add(0, batch.target_sample, losses) / (end - begin)


def token_weights(batch: Batch) -> Tensor:
    """Weight [L] of every target token: its sample's (0 for a sentence that only fills a rank's share)."""
    return batch.weight[batch.target_sample]
