"""Baichuan2-7B as a plain Llama: converted once into the cache, so that none of the checkpoint's own code runs.

    slicetune baichuan DIR NEW        # by hand, from pickled weights too; --model.path does it for safetensors
    folder = converted(Path("models/Baichuan2-7B-Base"))

Yang et al. 2023, "Baichuan 2: Open Large-scale Language Models": rotary positions, RMSNorm, SwiGLU and no biases, as in
a Llama, but for two things. `W_pack` [3H, H] holds the rows of q, k and v one after the other: it is cut in three. The
output head is normalised (NormHead): logits are products with head rows of length 1. The stored rows are not, so they
are divided by their length here, in fp32 and rounded once. Full fine-tuning then trains these rows as any others.

Everything after this reads the converted folder as its base: scores, export, delta and audit are exact on it, and an
export is a Llama that any program loads. The hub's repository has pickled weights: a run never reads them, the command
does, by torch's loader that builds nothing but tensors.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...common.errors import UserError
from ...common.files import cached, read_json
from ...common.shards import INDEX, SINGLE, Entry, open_shard, tensor_files, write_shard
from .pieces import fast_tokenizer

PREFIX = "baichuan2-"
"""What a converted folder's name begins with."""
VERSION = 1
"""Of what `convert` writes: raise it when that changes, and checkpoints are converted anew."""
KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""Settings that a Llama has under the same name."""
PACKED, HEAD, ROTARY = "self_attn.W_pack.weight", "lm_head.weight", "rotary_emb.inv_freq"
HIDDEN_13B = 5120

Read = Callable[[str], Tensor]


def is_baichuan(settings: dict[str, Any]) -> bool:
    """Whether a config.json is of this family, whatever code it asks for."""
    return settings.get("model_type") == "baichuan"


def llama_config(settings: dict[str, Any], where: str = "config.json") -> dict[str, Any]:
    """The same model's config.json as a Llama.

    Raises UserError for a relative: the 13B models have ALiBi and no `max_position_embeddings`, the first Baichuan-7B
    (`BaiChuanForCausalLM`) has a head that is not normalised.
    """
    rotary = "max_position_embeddings" in settings and settings.get("hidden_size") != HIDDEN_13B
    if settings.get("architectures") != ["BaichuanForCausalLM"] or not rotary:
        raise UserError(f"{where}: of the Baichuan models only Baichuan2-7B is known: use Baichuan2-7B-Base or -Chat")
    if missing := [key for key in KEPT if key not in settings]:
        raise UserError(f"{where}: has no {missing[0]}: download it again")
    kept = {key: settings[key] for key in KEPT}
    return kept | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_key_value_heads": settings["num_attention_heads"],
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "dtype": settings.get("torch_dtype") or settings.get("dtype") or "bfloat16",
    }


def converted(folder: Path) -> Path:
    """The folder of the Llama that this checkpoint is; written into the cache on the first call.

    A name of its own for every place, size and time of the files: two checkpoints of one shape must not be mistaken.
    Raises UserError as `convert` does.
    """
    digest = hashlib.sha256(f"version {VERSION}".encode())
    files = (*folder.glob("*.safetensors"), *folder.glob("*.json"), folder / "tokenizer.model")
    for file in sorted(f for f in files if f.is_file()):
        about = file.stat()
        digest.update(f"{file.resolve()} {about.st_size} {about.st_mtime_ns}".encode())
    return cached(f"{PREFIX}{digest.hexdigest()[:16]}", lambda out: convert(folder, out))


def convert(folder: Path, out: Path, pickled: bool = False) -> None:
    """Write the Llama to `out`, a new or an empty folder: config, weights shard by shard, a fast tokenizer.

    `pickled` allows pytorch_model*.bin where there is no safetensors file. Raises UserError for what cannot be read or
    is of another shape than the config says, and for a disk without room.
    """
    settings = read_json(folder / "config.json")
    config = llama_config(settings, str(folder / "config.json"))
    shards = _shards(folder, pickled)
    size = sum(shard.stat().st_size for shard in shards)
    out.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(out.parent).free < 1.01 * size:
        raise UserError(
            f"{out.parent}: the converted model needs {size / 1e9:.1f} GB: make room, or set SLICETUNE_CACHE"
        )
    tokenizer_config = folder / "tokenizer_config.json"
    named = read_json(tokenizer_config) if tokenizer_config.is_file() else {}
    tokenizer = fast_tokenizer(folder / "tokenizer.model", named)
    out.mkdir(exist_ok=True)
    tokenizer.save_pretrained(out)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with _opened(shard) as (entries, read):
            plan = {new.name: (new, make) for old in entries for new, make in _llama_tensors(shard, old, read, config)}
            write_shard(out / name, [new for new, _ in plan.values()], lambda n: plan[n][1](), {"format": "pt"})  # noqa: B023
        weight_map |= dict.fromkeys(plan, name)
    if len(shards) > 1:
        _write(out / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write(out / "generation_config.json", ids)
    _write(out / "config.json", config)


def _llama_tensors(
    shard: Path, entry: Entry, read: Read, config: dict[str, Any]
) -> Iterator[tuple[Entry, Callable[[], Tensor]]]:
    """What one tensor becomes: its new entries, and what reads each."""
    hidden = config["hidden_size"]
    if entry.name.endswith(ROTARY):  # follows from the config
        return
    if entry.name.endswith(PACKED):
        if entry.shape != (3 * hidden, hidden):
            raise UserError(f"{shard}: {entry.name} is {entry.shape}, not 3 × {hidden} rows: download it again")
        for i, part in enumerate(("q_proj", "k_proj", "v_proj")):
            name = entry.name.replace("W_pack", part)
            rows = slice(i * hidden, (i + 1) * hidden)
            yield Entry(name, entry.dtype, (hidden, hidden)), lambda rows=rows: read(entry.name)[rows]
    elif entry.name == HEAD:
        yield entry, lambda: F.normalize(read(HEAD).float(), dim=-1).to(entry.dtype)
    else:
        yield entry, lambda: read(entry.name)


def _shards(folder: Path, pickled: bool) -> list[Path]:
    """Files that hold the weights."""
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        return [folder / name for name in sorted(set(tensor_files(folder).values()))]
    if pickled and pickles:
        return pickles
    raise UserError(
        f"{folder} has no safetensors file (the hub's Baichuan2 is pickled): download all of it, convert it once with "
        "`slicetune baichuan DIR NEW`, and name NEW as --model.path"
    )


@contextmanager
def _opened(file: Path) -> Iterator[tuple[list[Entry], Read]]:
    """A file's entries, and what reads one of them."""
    if file.suffix == ".safetensors":
        with open_shard(file) as shard:
            yield list(shard.entries.values()), shard.read
        return
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # unpickling has a dozen kinds; each means that this is not a file of tensors
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise UserError(f"{file}: no file of tensors alone ({type(error).__name__}: {reason}): not read") from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{file}: holds other things than tensors: not read")
    yield [Entry(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()], tensors.__getitem__


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
