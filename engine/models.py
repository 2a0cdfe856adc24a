"""Load a causal LM and its tokenizer: from a folder, the hub, or generated on the spot (`tiny`).

Weights go straight to their device; no pickle and no remote code is read. Next: ffn.py finds the FFNs by structure.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config import ModelConfig
from .errors import UserError


def resolve(path: str) -> str:
    """The model's folder or hub id; `tiny` is built (once, cached) and its folder returned."""
    if path == "tiny":
        from . import tiny

        return str(tiny.model_dir())
    if os.sep in path and path[0] in "./~" and not Path(path).expanduser().is_dir():
        raise UserError(f"--model.path {path}: no such folder")
    return str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else path


def snapshot(path: str) -> Path:
    """The local folder that holds the model's files, downloaded first if `path` is a hub id.

    Raises UserError if the folder has no safetensors (pickle is not read) or the hub refuses.
    """
    path = resolve(path)
    folder = Path(path) if Path(path).is_dir() else _download(path)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json, so not a Hugging Face model folder")
    if "auto_map" in read_config(folder):
        raise UserError(f"{folder}/config.json asks for code of its own (auto_map): remote code is not run")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: no .safetensors file (pickled weights are not read): convert the checkpoint first")
    _check_shards(folder)
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{folder}/config.json is not JSON ({error}): download it again") from None


def _check_shards(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    for shard in sorted(set(json.loads(index.read_text())["weight_map"].values())):
        if Path(shard).name != shard:
            raise UserError(f"{index}: shard name {shard!r} points outside the folder: do not use this checkpoint")
        if not (folder / shard).is_file():
            raise UserError(f"{index}: shard {shard} is missing: download the checkpoint again")


def _download(path: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model"]))
    except Exception as error:  # the hub raises a dozen kinds; each means that the model cannot be had
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"--model.path {path}: not a folder, and the hub gave none of it ({type(error).__name__}: {reason}). "
            "For a gated model accept its licence on its page and run `hf auth login`; offline, name a local folder"
        ) from None


def attention_path(choice: str, device: torch.device) -> str:
    """The attention implementation by transformers' name. Raises UserError if flash-attn is asked for and missing."""
    installed = importlib.util.find_spec("flash_attn") is not None and device.type == "cuda"
    if choice == "flash" and not installed:
        raise UserError("--model.attention flash: flash-attn needs a GPU and `pip install slicetune[flash]`")
    if choice == "auto":
        choice = "flash" if installed else "sdpa"
    return "flash_attention_2" if choice == "flash" else choice


def model_dtype(choice: str, device: torch.device) -> torch.dtype:
    if choice == "auto":
        choice = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return getattr(torch, choice)


def load_tokenizer(path: str) -> Any:
    """The tokenizer, with a padding token (its end token if it has none: labels never depend on it)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(snapshot(path))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(path: str, config: ModelConfig, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """The frozen base on `device` in `config.dtype` (or `dtype`), in evaluation mode; it never uses a cache.

    With a KV cache transformers ignores the position_ids that mark the samples of a packed batch (logits off by 0.5),
    so it is off here; decoding turns it on for itself.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        snapshot(path),
        dtype=dtype or model_dtype(config.dtype, device),
        attn_implementation=attention_path(config.attention, device),
        device_map=None if device.type == "cpu" else device,
    )
    model.config.use_cache = False
    model.eval()
    model.requires_grad_(False)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def takes_position_ids(model: nn.Module) -> bool:
    """Whether packed batches work: BLOOM (ALiBi) has no position_ids, so it is padded instead."""
    return getattr(model.config, "model_type", "") != "bloom"
