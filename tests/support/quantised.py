"""A quantised model, and its twin: the same model in full precision with the quantised weights' values in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from slicetune.engine.models.config import ModelConfig
from slicetune.engine.models.load import load_model
from slicetune.engine.models.quantised import layers
from slicetune.engine.slices.frozen.layer import SlicedLinear


def loaded(folder: Path, how: str, dtype: str = "float32") -> nn.Module:
    return load_model(str(folder), ModelConfig(quantize=how, attention="eager", dtype=dtype), torch.device("cpu"))


def twin(folder: Path, how: str, trained: nn.Module | None = None, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The twin of the base, or of what is trained on it: bitsandbytes' own dequantised weights, slices copied in."""
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    plain = AutoModelForCausalLM.from_pretrained(folder, **options).eval().to(dtype)
    with torch.no_grad():
        for name, layer in layers.layers(loaded(folder, how)):
            plain.get_submodule(name).weight.copy_(layers.dequantised(layer, torch.float32))
        for name, module in trained.named_modules() if trained is not None else ():
            for p, tensor, axis, index in module.parts() if isinstance(module, SlicedLinear) else ():
                own = getattr(plain.get_submodule(name), tensor)
                own.index_copy_(axis, index, (p.t() if axis else p).to(dtype))
    return plain
