"""From the last hidden states to logits: a product with the output head, and what some models do to it.

    logits = cap · tanh(scale · (h Wᵀ + b) / cap)       Gemma-2 caps, Cohere and Granite scale, most do neither

The loss makes the logits of few tokens itself (scoring/cross_entropy.py), so it must know. The class's own forward says
it: it runs on a copy with a small head and hidden states of its own choice, which needs no weights.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..common.errors import UserError
from ..common.private import with_children


class LogitRule(NamedTuple):
    """What a model does to the product of hidden states and head."""

    scale: float = 1.0
    cap: float | None = None


_rules: weakref.WeakKeyDictionary[nn.Module, LogitRule] = weakref.WeakKeyDictionary()
TOKENS, VOCABULARY = 3, 8


def logit_rule(model: nn.Module) -> LogitRule:
    """The rule of a causal LM, with weights or without; found once.

    Raises UserError for one that does anything else to its logits.
    """
    if model not in _rules:
        _rules[model] = _find(model)
    return _rules[model]


def _find(model: nn.Module) -> LogitRule:
    cap = getattr(model.config, "final_logit_softcapping", None)
    plain, given = _own_logits(model)
    for scale in _scales(model.config):
        own = plain * scale if cap is None else cap * torch.tanh(plain * scale / cap)
        if given is not None and torch.allclose(own, given.to(own.dtype), rtol=1e-5, atol=1e-6):
            return LogitRule(scale, cap)
    raise UserError(
        f"{type(model).__name__}: its logits are more than a product with the output head (scaled or capped in a way "
        "that is not known): such a model cannot be trained here"
    )


def _scales(config: Any) -> list[float]:
    """The factors that a config names, by the names that models give them; 1 first."""
    product = [getattr(config, name, None) for name in ("logit_scale", "lm_head_multiplier")]
    width = getattr(config, "dim_model_base", None)  # MiniCPM: hidden states are divided by H / dim_model_base
    quotient = [getattr(config, "logits_scaling", None), config.hidden_size / width if width else None]
    return [1.0, *(float(p) for p in product if p), *(1 / float(q) for q in quotient if q)]


def _own_logits(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(h Wᵀ, the class's logits of h) for a small head; None where its forward cannot run so."""
    head, body = model.get_output_embeddings(), model.base_model
    names = {id(child): name for name, child in model.named_children()}
    draw, width = torch.Generator().manual_seed(0), model.config.hidden_size
    hidden = torch.randn(1, TOKENS, width, generator=draw, device="cpu")
    weight = torch.randn(VOCABULARY, width, generator=draw, device="cpu")
    plain = hidden @ weight.t()
    if id(head) not in names or id(body) not in names:
        return plain, None
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        small = nn.Linear(width, VOCABULARY, bias=False)
    small.weight = nn.Parameter(weight, requires_grad=False)
    stub = with_children(
        model, dict(model.named_children()) | {names[id(head)]: small, names[id(body)]: _Given(hidden)}
    )
    try:
        with torch.no_grad():
            ids = torch.zeros(1, TOKENS, dtype=torch.int64, device="cpu")
            return plain, type(model).forward(stub, input_ids=ids, use_cache=False).logits
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):
        return plain, None


class _Given(nn.Module):
    """In the place of the model's body: gives these hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=self.hidden)
