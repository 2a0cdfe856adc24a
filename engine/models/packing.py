"""Whether sentences can lie one behind the other in one row: whether a model keeps them apart by position_ids.

Most decoders of transformers do; ALiBi models take no positions, and a recurrent or convolving layer carries one
sentence into the next. It is seen on the loaded model, by two short samples together and alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..common import distributed, private
from ..data.batching import Batch, Example, pack
from . import attention, kinds

LENGTHS = (5, 7)
LIMIT = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Largest relative deviation of the hidden states, by what the model computes in; half precision rounds to 0.05."""


def takes_position_ids(model: nn.Module) -> bool:
    """Whether packed rows give what single sentences give; where not, batches are padded."""
    return getattr(model, "packs_rows", None) is not False and kinds.takes_positions(model)


def packs_long_rows(model: nn.Module) -> bool:
    """Whether thousands of tokens go into one packed row without waste.

    flash-attn and torch's varlen skip what lies outside a sample; other attention computes the whole square of the
    row (4,096 tokens of 90-token sentences: 45 times the work), so there sentences sorted by length are padded instead.
    """
    return takes_position_ids(model) and private.attention_of(model) in attention.SAMPLE_BY_SAMPLE


@torch.no_grad()
def find_out(model: nn.Module) -> None:
    """Note on a loaded model whether it packs: `takes_position_ids` goes by it."""
    if not kinds.takes_positions(model):
        return
    draw, vocabulary = torch.Generator().manual_seed(0), model.get_input_embeddings().weight.shape[0]
    ids = [torch.randint(vocabulary, (length,), generator=draw).tolist() for length in LENGTHS]
    examples = [Example(tokens, 1, 0, str(i)) for i, tokens in enumerate(ids)]
    together = _hidden(model, pack(examples))
    alone = torch.cat([_hidden(model, pack([example])) for example in examples])
    error = (together - alone).norm() / alone.norm().clamp_min(1e-30)
    model.packs_rows = bool(error <= LIMIT.get(next(model.parameters()).dtype, 0.05))
    if not model.packs_rows:
        distributed.print0(f"{type(model).__name__} mixes sentences that lie in one row: batches are padded instead")


def _hidden(model: nn.Module, batch: Batch) -> Tensor:
    batch = batch.to(next(model.parameters()).device)
    return model.base_model(**attention.inputs_of(model, batch)).last_hidden_state.flatten(0, 1).float()
