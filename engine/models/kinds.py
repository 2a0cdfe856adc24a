"""What kind of model a config.json describes: a dense decoder of whole numbers' weights, or what is refused and why."""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import nn

from ..common.errors import UserError

PARTS = re.compile("vision|image|audio|speech|video|vq|text|patch|encoder")
"""In the name of a config's part: more than one text decoder."""


def check(settings: dict[str, Any], where: str) -> None:
    """Raises UserError, one line that says what it is, for a config.json of anything but a plain decoder.

    Refused are quantised weights, model types that the installed transformers does not know, encoder-decoders,
    encoders, and models with a part that sees or hears.
    """
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if quantised := settings.get("quantization_config") or settings.get("compression_config"):
        method = quantised.get("quant_method", "its kind is not named") if isinstance(quantised, dict) else quantised
        raise UserError(f"{where}: the weights are quantised ({method}): take the unquantised checkpoint")
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
