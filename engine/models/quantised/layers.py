"""What a quantised linear layer is: which kind, and its values as floats.

    y = x · Ŵᵀ + b,     dx = dy · Ŵ          Ŵ: the stored numbers as floats (`dequantised`), in the dtype of x

This is what all kinds compute but fp8, which rounds x and dy too (float8.py). The layers are bitsandbytes' own, so that
PEFT knows them. Needs torch alone until it meets one. Next: stored.py, where the unquantised values lie; load.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from . import float8
from .float8 import Float8Linear


def kind(linear: nn.Module) -> str:
    """`nf4`, `fp4`, `int8` or `fp8`; empty for a layer that is not quantised."""
    if isinstance(linear, Float8Linear):
        return "fp8"
    weight = getattr(linear, "weight", None)
    if getattr(weight, "quant_state", None) is not None:
        return weight.quant_state.quant_type
    return "int8" if isinstance(weight, nn.Parameter) and _row_maxima(linear) is not None else ""


def _row_maxima(linear: nn.Module) -> Tensor | None:
    """Of an int8 layer, float32 [out]; its own forward moves them from the weight into its state."""
    own = getattr(linear.weight, "SCB", None)
    return getattr(getattr(linear, "state", None), "SCB", None) if own is None else own


def dequantised(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight of a quantised layer as floats [out, in], a tensor of its own."""
    if isinstance(linear, Float8Linear):
        return float8.dequantised(linear.values, linear.scales, dtype)
    from bitsandbytes import functional

    if kind(linear) == "int8":
        return functional.int8_vectorwise_dequant(linear.weight.data, _row_maxima(linear)).to(dtype)
    return functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state).to(dtype)


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of every quantised linear layer."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear) and kind(module))


def is_quantised(model: nn.Module) -> bool:
    return next(layers(model), None) is not None
