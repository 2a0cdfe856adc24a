"""Which attention a model takes, and what a batch tells it of where samples begin.

flash-attn and torch's own variable-length attention compute a packed row sample by sample. torch's has no place in
transformers: it is registered there under a name of ours, without a mask, for whatever a causal row without one means.
"""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common import private
from ..common.errors import UserError
from ..data.batching import Batch
from .shapes import ModelShape

varlen: Any = None
"""torch.nn.attention.varlen, imported when it is chosen: torch's compiler comes with it, a second of every start."""
TAKES_GQA = True
"""Whether it takes fewer keys than queries itself; torch 2.11's does not."""
VARLEN = "slicetune_varlen"
SAMPLE_BY_SAMPLE = ("flash_attention_2", VARLEN)
"""Implementations that skip what lies outside a sample, by transformers' names."""


def attention_path(choice: str, device: torch.device, about: dict[str, Any], dtype: torch.dtype) -> str:
    """The attention implementation by transformers' name, for a model by its config.json and the dtype it runs in.

    `auto`: flash-attn where it is installed, else torch's varlen, else sdpa, else (Gemma-2's capped scores, BLOOM's
    ALiBi) eager. Raises UserError for one that was asked for and cannot be had.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    model_type = about["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise UserError(f"model_type {model_type!r} is not one that the installed transformers knows: upgrade it")
    supports = private.attentions_of(MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]])
    no_flash = "" if flash_attn(device) else "flash-attn needs a GPU and `pip install slicetune[flash]`"
    no_varlen = _no_varlen(device, about, dtype) if supports["any"] else ""
    can = {
        "flash": not no_flash and supports["flash"],
        "varlen": not no_varlen and supports["any"],
        # transformers 5.17 lets Gemma-2 take sdpa, which leaves out the cap without a word.
        "sdpa": supports["sdpa"] and not about.get("attn_logit_softcapping"),
        "eager": True,
    }
    if choice == "auto":
        choice = next(name for name in can if can[name])
    if why := {"flash": no_flash, "varlen": no_varlen}.get(choice):
        raise UserError(f"--model.attention {choice}: {why}")
    if not can[choice]:
        raise UserError(f"--model.attention {choice}: {model_type} does not support it: use auto")
    if choice == "varlen":
        load_varlen()
    return {"flash": "flash_attention_2", "varlen": VARLEN}.get(choice, choice)


def likely_path(choice: str, half: bool, shape: ModelShape) -> str:
    """`flash`, `varlen`, `sdpa` or `eager`: as attention_path, on a GPU that is not here, by a model's shape alone.

    `half` says that the model runs in half precision. varlen and sdpa cap no logits (Gemma-2) and some models have
    their own attention alone (BLOOM): those fall back to eager.
    """
    if choice == "auto":
        varlen = half and not no_varlen_of_shape({"head_dim": shape.head_dim})
        choice = "flash" if importlib.util.find_spec("flash_attn") else "varlen" if varlen else "sdpa"
    return "eager" if not shape.backends or (shape.softcap and choice in ("varlen", "sdpa")) else choice


def load_varlen() -> None:
    """Import torch's varlen attention, once."""
    global varlen, TAKES_GQA
    if varlen is None:
        from torch.nn.attention import varlen as module

        varlen, TAKES_GQA = module, "enable_gqa" in inspect.signature(module.varlen_attn).parameters


def flash_attn(device: torch.device) -> bool:
    """Whether flash-attn is installed and can run on `device`."""
    return importlib.util.find_spec("flash_attn") is not None and device.type == "cuda"


def packed_path(device: torch.device, dtype: torch.dtype) -> str:
    """What computes a packed row on `device`, of a model that forbids nothing: `flash`, `varlen` or `sdpa`."""
    return "flash" if flash_attn(device) else "sdpa" if _no_varlen(device, {}, dtype) else "varlen"


def _no_varlen(device: torch.device, about: dict[str, Any], dtype: torch.dtype) -> str:
    """Why torch's varlen attention cannot be had, empty if it can: its kernel is flash attention's, without a cap."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return "torch's varlen attention needs an NVIDIA GPU of compute capability 8.0 or more: use auto"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"torch's varlen attention computes no {dtype}: use auto, or --model.dtype bfloat16"
    return no_varlen_of_shape(about)


def no_varlen_of_shape(about: dict[str, Any]) -> str:
    """What in a model's config.json forbids varlen attention, empty if nothing."""
    head = about.get("head_dim") or about.get("hidden_size", 0) // about.get("num_attention_heads", 1)
    if about.get("attn_logit_softcapping"):
        return "torch's varlen attention caps no scores: use flash (slicetune[flash]), or auto"
    if head > 256 or head % 8:
        return f"torch's varlen attention takes heads of up to 256, a multiple of 8, not of {head}: use auto"
    return "torch's varlen attention has no dropout: use auto" if about.get("attention_dropout") else ""


def inputs_of(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """What the base model's forward takes of a batch, on the batch's device.

    No mask: in a packed row transformers sees by the position_ids where samples begin (if there is no cache), or is
    told here, once a batch: else flash-attn would ask the GPU in every layer. In a row that is padded on the right
    attention is causal, so no token sees the padding after it, and positions count from the row's start as ever.
    """
    inputs = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.position_ids is None:
        return inputs
    inputs["position_ids"] = batch.position_ids
    if private.attention_of(model) in SAMPLE_BY_SAMPLE:
        bounds = F.pad(batch.segments[:, 1], (1, 0))
        inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        longest = max(end - begin for begin, end in batch.ranges)
        inputs |= {"max_length_q": longest, "max_length_k": longest}
    return inputs


def register() -> None:
    """Make torch's varlen attention known to transformers, as VARLEN."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(VARLEN, _attend)
    AttentionMaskInterface.register(VARLEN, _mask)


def _mask(q_length: int, kv_length: int, attention_mask: Tensor | None = None, **how: Any) -> Tensor | None:
    """None for whole rows without padding, which `_attend` knows to be causal; else (decoding) what sdpa takes."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **how)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within every sample, or sdpa where there is a mask or a cache. query [B, heads, S, D]."""
    rows, heads, length, width = query.shape
    if attention_mask is not None or length != key.shape[2]:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    load_varlen()
    if cu_seq_lens_q is None:
        cu_seq_lens_q, max_length_q = _bounds(rows, length, position_ids, query.device)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    gqa = {"enable_gqa": True} if k.shape[1] != heads and TAKES_GQA else {}
    if k.shape[1] != heads and not TAKES_GQA:
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    spans = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    y = varlen.varlen_attn(q, k, v, *spans, scale=scaling, window_size=window, **gqa)
    return y.view(rows, length, heads, width), None


def _bounds(rows: int, length: int, positions: Tensor | None, device: torch.device) -> tuple[Tensor, int]:
    """Where samples begin and end in rows laid one after the other, int32 [samples + 1], and the longest one's tokens.

    For a forward that does not say: it asks the device.
    """
    begins = torch.zeros(rows, length, dtype=torch.bool, device=device)
    begins[:, 0] = True
    if positions is not None:
        begins |= positions == 0
    starts = begins.flatten().nonzero()[:, 0]
    bounds = F.pad(starts, (0, 1), value=rows * length)
    return bounds.to(torch.int32), int(bounds.diff().max())
