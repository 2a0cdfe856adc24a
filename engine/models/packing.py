"""Whether sentences can lie one behind the other in one row: whether a model keeps them apart by position_ids.

Most decoders of transformers do; ALiBi models take no positions, and a recurrent or convolving layer carries one
sentence into the next. It is seen on the loaded model: of two short samples in a row the second must not change with
the first, nor from what it is alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..common import distributed, private
from ..data.batching import Example, pack
from . import attention, kinds
from .large.partition import gathering
from .quantised.layers import kind, layers

LENGTHS = (5, 7)
LIMIT = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Largest relative deviation of the hidden states from a sample's alone, by what the model computes in; half precision
rounds to 0.05."""
FLOAT8 = 0.5
"""The same of a model whose products round to float8: where a product adds up in another order, roundings flip."""
LEAK = 1e-4
"""The same from another sample before it. Only that one's values differ, so nothing is rounded otherwise: what is kept
apart is equal bit for bit, and in half precision too a small leak shows."""


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
    draw, vocabulary = torch.Generator().manual_seed(0), model.get_input_embeddings().num_embeddings
    first, other, second = (
        torch.randint(vocabulary, (length,), generator=draw).tolist() for length in (LENGTHS[0], *LENGTHS)
    )
    with gathering(model):
        alone = _hidden(model, second)
        behind, behind_other = (_hidden(model, before, second)[-len(second) :] for before in (first, other))
    float8 = any(kind(layer) == "fp8" for _, layer in layers(model))
    limit = FLOAT8 if float8 else LIMIT.get(next(model.parameters()).dtype, 0.05)
    same = _apart(behind, alone) <= limit
    model.packs_rows = same and _apart(behind, behind_other) <= LEAK
    if not model.packs_rows:
        distributed.print0(f"{type(model).__name__} mixes sentences that lie in one row: batches are padded instead")


def _apart(states: Tensor, others: Tensor) -> float:
    return float((states - others).norm() / others.norm().clamp_min(1e-30))


def _hidden(model: nn.Module, *samples: list[int]) -> Tensor:
    """Hidden states of all tokens of a packed row, fp32."""
    batch = pack([Example(ids, 1, 0, str(number)) for number, ids in enumerate(samples)])
    batch = batch.to(next(model.parameters()).device)
    return model.base_model(**attention.inputs_of(model, batch)).last_hidden_state.flatten(0, 1).float()
