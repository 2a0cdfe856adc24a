"""Load a model with the linear layers of its blocks quantised, a weight at a time: no device holds the whole of it.

    model = load(Path("models/llama"), torch.bfloat16, "sdpa", "nf4", device)

nf4 is QLoRA's: blocks of 64 values, whose scales are quantised again (Dettmers et al. 2023, "QLoRA: Efficient
Finetuning of Quantized LLMs"). Embeddings, output head, norms and biases stay as they are. Every layer remembers where
its unquantised weight lies (stored.Stored): slices begin with those values, and the export patches those files.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ...common import distributed, private
from ...common.errors import UserError
from ...common.shards import Shard
from ..large import weights
from ..linears import is_product
from ..sites import find_ffns
from . import float8
from .float8 import Float8Linear
from .layers import kind
from .stored import Stored


def load(folder: Path, dtype: torch.dtype, attention: str, how: str, device: torch.device) -> nn.Module:
    """The model in `folder` on `device`, `how` being `nf4`, `int8` or `fp8`; other weights are in `dtype`.

    The folder was checked before (folders.check). Raises UserError as weights.fill does, for a weight that is not
    finite, which quantisation would hide, and for what `how` cannot do.
    """
    if how == "fp8":
        _check_float8(device)
    model = weights.empty(folder, dtype, attention)
    chosen = replaced(model, how, dtype)

    def take(shard: Shard, key: str, name: str, empty: nn.Parameter) -> nn.Parameter:
        value = shard.read(key)
        layer = chosen.get(name.removesuffix(".weight"))
        if layer is None:
            return nn.Parameter(value.to(device, empty.dtype), requires_grad=False)
        if not bool(torch.isfinite(value.sum(dtype=torch.float32))):
            raise UserError(f"{shard.path}: {key} holds NaN or infinity: the checkpoint is damaged, download it again")
        layer.stored = Stored(shard.path, key, dtype)
        kept = quantised(layer, value.to(device, dtype))
        if device.type == "cpu":
            private.collect()  # the heap keeps what quantising took and gave back, several times the model
        return kept

    weights.fill(model, folder, take, device)
    for name, layer in chosen.items():
        assert kind(layer), name
    # What PEFT goes by.
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = how == "nf4", how == "int8"
    return model


def _check_float8(device: torch.device) -> None:
    """Raises UserError for a GPU without float8 products; on a CPU they are made in fp32, which is said."""
    if device.type == "cpu":
        distributed.print0("fp8: a CPU has no such products: the same numbers are multiplied in float32, which is slow")
    elif torch.cuda.get_device_capability(device) < float8.CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise UserError(f"--model.quantize fp8: {name} has no float8 products: use nf4 or int8")


def replaced(model: nn.Module, how: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Put empty quantised layers in the place of the linear layers of the blocks; name → the new layer."""
    found: dict[str, nn.Module] = {}
    for site in find_ffns(model):
        if how == "fp8" and site.packed:
            raise UserError(f"--model.quantize fp8: {site.name} packs gate and up in one layer: use nf4 or int8")
        inside = model.get_submodule(site.block).named_modules()
        found |= {f"{site.block}.{name}": m for name, m in inside if isinstance(m, nn.Linear) and is_product(m)}
    layers = {name: _empty(linear, how, dtype) for name, linear in found.items()}
    for name, layer in layers.items():
        layer.bias = found[name].bias
        model.set_submodule(name, layer)
    return layers


def _empty(linear: nn.Linear, how: str, dtype: torch.dtype) -> nn.Module:
    """A layer of that size without values, and without a bias."""
    size = linear.in_features, linear.out_features
    if how == "fp8":
        meta = {"device": "meta"}
        return Float8Linear(torch.empty(size[::-1], dtype=float8.FLOAT8, **meta), torch.empty(size[1], **meta))
    from bitsandbytes import nn as layers

    from .int8 import Int8Linear

    if how == "int8":
        return Int8Linear(*size, bias=False, has_fp16_weights=False, device="meta")
    made = layers.Linear4bit(*size, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
    # On a CPU with these instructions its decoding repacks the weight, of which its backward then makes other values.
    made.support_avx512bf16_for_cpu = False
    return made


def quantised(layer: nn.Module, value: Tensor) -> nn.Parameter:
    """A weight [out, in] as the layer holds it, on the weight's device."""
    if isinstance(layer, Float8Linear):
        values, scales = float8.quantised(value)
        layer.scale_bits = scales.view(torch.int32)
        return nn.Parameter(values.view(torch.uint8), requires_grad=False)
    from bitsandbytes import nn as layers

    if isinstance(layer, layers.Linear4bit):
        return layers.Params4bit(value, quant_type="nf4", compress_statistics=True, module=layer).to(value.device)
    return layers.Int8Params(value.cpu(), requires_grad=False).to(value.device)
