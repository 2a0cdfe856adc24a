"""What kind of model a config.json describes: a plain decoder that writes text, or what is refused and why."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ..common import distributed
from ..common.errors import UserError

DEPTH = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""What configs call the number of blocks."""
MOST_LAYERS = 1000
"""More than any model has: a config.json that asks for them is damaged."""
PARTS = re.compile("vision|image|audio|speech|video|vq|text|patch|encoder")
"""In the name of a config's part: more than one text decoder."""


def check(settings: dict[str, Any], where: str) -> None:
    """Raises UserError, one line that says what it is, for a config.json of anything but a plain decoder.

    Refused are quantised weights, model types that the installed transformers does not know, encoder-decoders, models
    with a part that sees or hears, and those that write no text. Mixtures of experts and encoders are found later, by
    their modules (sites.py).
    """
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if quantised := settings.get("quantization_config") or settings.get("compression_config"):
        method = quantised.get("quant_method", "its kind is not named") if isinstance(quantised, dict) else quantised
        raise UserError(f"{where}: the weights are quantised ({method}): take the unquantised checkpoint")
    layers = next((settings[name] for name in DEPTH if name in settings), 1)
    if isinstance(layers, int) and not 0 < layers <= MOST_LAYERS:  # before so many are built
        raise UserError(f"{where}: {layers} layers: download config.json again")
    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise UserError(f"{where}: transformers {__version__} knows no model_type {kind!r}: upgrade it, or use another")
    about = CONFIG_MAPPING[kind]
    if settings.get("is_encoder_decoder", getattr(about, "is_encoder_decoder", False)):
        raise UserError(f"{where}: {kind} is an encoder-decoder: use a decoder, such as a Llama, Qwen or Gemma")
    if parts := [part for part in about.sub_configs if PARTS.search(part)]:
        raise UserError(
            f"{where}: {kind} has more parts than a text decoder ({', '.join(parts)}): use a text-only model"
        )
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"{where}: {kind} is no decoder that writes text: use one, such as a Llama, Qwen or Gemma")


def takes_positions(model: nn.Module) -> bool:
    """Whether its forward takes position_ids and goes by them: BLOOM and other ALiBi models count tokens themselves."""
    alibi = getattr(model.config, "alibi", False) or getattr(model.config, "position_embedding_type", "") == "alibi"
    return not alibi and "position_ids" in inspect.signature(type(model.base_model).forward).parameters


def check_length(config: Any, longest: int, what: str) -> str:
    """Look at the longest row of tokens that a model shall read; a warning, empty if there is nothing to say.

    `config` is a Hugging Face config, `what` names the row. Raises UserError where a longer row is read otherwise than
    its parts (rotary angles that depend on the longest row of a batch) or not at all (learned positions).
    """
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = {each.get("rope_type", each.get("type")) for each in (rope, *rope.values()) if isinstance(each, dict)}
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if "longrope" in kinds:
        own = rope.get("original_max_position_embeddings", getattr(config, "original_max_position_embeddings", None))
        limit = min(filter(None, (limit, own)), default=None)
    if not isinstance(limit, int) or longest <= limit:
        return ""
    remedy = f"{what} has {longest:,} tokens, the model's limit is {limit:,}"
    if changing := sorted(kinds & {"dynamic", "longrope"}):
        raise UserError(
            f"{remedy}: beyond it its rotary positions ({changing[0]}) change with the longest row of a batch, and all "
            "sentences in it with them: lower --data.max-length or --evaluate.max-new-tokens"
        )
    if not rope and not hasattr(config, "rope_theta"):
        raise UserError(f"{remedy}: it has learned no more positions: lower --data.max-length")
    return f"{remedy}: it was not trained on more"


def look_at_lengths(config: Any, named: Iterable[tuple[str, Sequence[int]]], more: int = 0) -> None:
    """`check_length` of the longest of (name, ids), with `more` tokens that are added to it; a warning is printed.

    `config` is a Hugging Face config or a parsed config.json.
    """
    from transformers import AutoConfig

    name, longest = max(((name, len(ids)) for name, ids in named), key=lambda each: each[1], default=("", 0))
    config = AutoConfig.for_model(**config) if isinstance(config, dict) else config
    if line := check_length(config, longest + more, name):
        distributed.print0(f"warning: {line}")
