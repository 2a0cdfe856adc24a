"""Load a causal LM and its tokenizer: from a folder, the hub, or generated on the spot (`tiny`).

Weights go straight to their device; no pickle and no remote code is read. Next: sites.py finds the FFNs by structure.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..common import distributed, files, private
from ..common.errors import UserError
from ..data import tiny
from ..data.tokenizer import spelling, tokens
from . import attention, baichuan, folders, packing
from .config import ModelConfig
from .large import parallel, partition, plan
from .quantised import load as quantised

Held = Literal["whole", "partitioned", "parallel"]


def resolve(path: str) -> str:
    """The model's folder or hub id; `tiny` and `tiny-pairs` are built (once, cached) and their folder returned."""
    if path in ("tiny", "tiny-pairs"):
        return str(tiny.model_dir() if path == "tiny" else tiny.pairs_dir())
    if path.lower().endswith(".gguf"):
        raise UserError(f"--model.path {path}: GGUF weights are not read: take the model's safetensors checkpoint")
    if os.sep in path and path[0] in "./~" and not Path(path).expanduser().is_dir():
        raise UserError(f"--model.path {path}: no such folder")
    return str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else path


def snapshot(path: str) -> Path:
    """The local folder that holds the model's files, downloaded first if `path` is a hub id; Baichuan2's as a Llama.

    Raises UserError if the hub refuses, or for what folders.check finds.
    """
    path = resolve(path)
    folder = Path(path) if Path(path).is_dir() else _download(path)
    if (folder / "config.json").is_file() and baichuan.is_baichuan(config_json(folder)):
        folder = baichuan.converted(folder)
    folders.check(folder)
    return folder


def convert(source: Path, out: Path) -> None:
    """Write Baichuan2-7B in `source`, pickled or not, as a plain Llama to the new folder `out`, whole or not at all.

    Raises UserError as baichuan.convert does, and for an `out` that exists.
    """
    if out.exists():
        raise UserError(f"{out} exists: name a new folder")
    with files.whole_folder(out) as unfinished:
        baichuan.convert(source, unfinished, pickled=True)
        folders.check(unfinished)


def config_json(folder: Path) -> dict[str, Any]:
    return files.read_json(folder / "config.json")


def _download(path: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model"])
        )
    except Exception as error:  # the hub raises a dozen kinds; each means that the model cannot be had
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"--model.path {path}: not a folder, and the hub gave none of it ({type(error).__name__}: {reason}). "
            "For a gated model accept its licence on its page and run `hf auth login`; offline, name a local folder"
        ) from None


def model_dtype(choice: str, device: torch.device) -> torch.dtype:
    if choice == "auto":
        choice = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return getattr(torch, choice)


def load_tokenizer(path: str) -> Any:
    """The tokenizer, with a padding token (its end token if it has none: labels never depend on padding).

    Raises UserError for one that loses the spaces of a text or whose prompts hold tokens that the model has not; what
    else it loses is printed.
    """
    from transformers import AutoTokenizer

    folder = snapshot(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # missing, damaged or of an unknown kind: a dozen exceptions, one meaning
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise UserError(f"{folder}: no tokenizer that can be read ({type(error).__name__}: {reason})") from None
    rows = config_json(folder).get("vocab_size")
    if tokenizer.pad_token_id is None or (rows and tokenizer.pad_token_id >= rows):
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(tokens.shown(tokenizer)[-1])
    for line in spelling.warnings(tokenizer, str(folder)):
        distributed.print0(f"warning: {line}")
    if rows:
        tokens.check(tokenizer, [(f"{folder}: every prompt", tokens.shown(tokenizer))], rows)
    return tokenizer


def load_model(
    path: str,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype | None = None,
    held: Held = "whole",
) -> nn.Module:
    """The frozen base on `device` in `config.dtype` (or `dtype`), in evaluation mode; it never uses a cache.

    With a KV cache transformers ignores the position_ids that mark the samples of a packed batch (logits off by 0.5),
    so it is off here; decoding turns it on for itself.

    `held` is what this rank has of it: the whole; a part of each weight, which runs within `partition.gathering`; or
    the layers' parts of `parallel.load`, which decode. Every rank calls it then.
    """
    private.collect()
    folder = snapshot(path)
    about, dtype = config_json(folder), dtype or model_dtype(config.dtype, device)
    attention.register()
    path_taken = attention.attention_path(config.attention, device, about, dtype)
    if config.quantize != "none":
        assert held == "whole"
        model = quantised.load(folder, dtype, path_taken, config.quantize, device)
    elif held == "whole":
        model = _replica(folder, device, dtype, path_taken)
    elif held == "partitioned":
        model = partition.load(folder, dtype, path_taken)
    else:
        model = parallel.load(folder, dtype, path_taken, ranks_together(folder))
    folders.check_weights(folder, model, shared=held != "whole")
    model.config.use_cache = False
    model.eval()
    model.requires_grad_(False)
    packing.find_out(model)
    if config.checkpoints:
        checkpoint_activations(model)
    return model


def _replica(folder: Path, device: torch.device, dtype: torch.dtype, attention: str) -> nn.Module:
    """The whole model on `device`, its weights straight from the files."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        output_loading_info=True,
        dtype=dtype,
        attn_implementation=attention,
        device_map=None if device.type == "cpu" else device,
        use_safetensors=True,
        trust_remote_code=False,
    )
    folders.check_loaded(folder, model, info)
    return model


def ranks_together(folder: Path) -> int:
    """How many ranks decode the model in `folder` together (plan.together); 1: each one by itself."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return plan.together(config, distributed.world(), distributed.local_world())


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute every block in the backward pass (transformers renamed the call in 5.20)."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})


TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def fingerprint(folder: Path) -> str:
    """Of a checkpoint's config, its tokenizer, and every shard's name, size, header and 64 samples of its content.

    A fine-tuned model differs from its base in the samples alone; all of an 8B model would take half a minute to read.
    """
    digest = hashlib.sha256()
    for path in (folder / name for name in ("config.json", *TOKENIZER)):
        digest.update(path.read_bytes() if path.is_file() else b"-")
    for shard in sorted(folder.glob("*.safetensors")):
        size = shard.stat().st_size
        digest.update(f"{shard.name} {size}".encode())
        with shard.open("rb") as file:
            digest.update(file.read(1 << 16))
            for sample in range(64):
                file.seek(size * sample // 64)
                digest.update(file.read(1 << 12))
    return digest.hexdigest()[:16]
