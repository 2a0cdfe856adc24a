"""A run as a PEFT adapter: a slice delta is a LoRA adapter, and a LoRA run's is its own.

k trained rows are a product of rank k: B [out, k] one-hot, A [k, in] the rows' change; k columns the other way round,
B [out, k] the change, A [k, in] one-hot. alpha = rank, so the product counts once. The adapter's sum with the base is
the exported model, but for float32's rounding of old + (new − old); where that model was rounded, so is it
(--evaluate.dtype float32 keeps what was trained).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..common.checkpoint import masters
from ..common.errors import UserError
from ..common.files import whole_folder
from ..methods.lora import Lora
from . import delta

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for --max-lora-rank: it must be no less than an adapter's largest rank."""
PREFIX = "base_model.model."
"""What PEFT puts before a module's name."""


def write(delta_dir: Path, base: str, out: Path, own_ranks: bool) -> None:
    """The delta as an adapter for `base`; each layer with its own rank, or all with the largest, zeros filling up.

    Prints the size before it writes. Raises UserError where biases were trained (an adapter has none).
    """
    about = delta.read_about(delta_dir)["tensors"]
    bias = [name for name, tensor in about.items() if len(tensor["shape"]) != 2]
    if bias:
        raise UserError(f"{bias[0]}: a trained bias is no part of a LoRA adapter: use delta/ or model/")
    ranks = {name: len(part["index"]) for name, _, part in delta.slices(delta_dir)}
    largest = max(ranks.values())
    used = ranks if own_ranks else dict.fromkeys(ranks, largest)
    print(size_line({name: (rank, about[name]["shape"]) for name, rank in used.items()}), flush=True)
    tensors = {}
    for name, axis, part in delta.slices(delta_dir):
        a, b = factors(axis, part, about[name]["shape"], used[name])
        tensors[f"{PREFIX}{about[name]['module']}.lora_A.weight"] = a
        tensors[f"{PREFIX}{about[name]['module']}.lora_B.weight"] = b
    pattern = {about[name]["module"]: rank for name, rank in used.items() if rank != largest}
    settings = {"r": largest, "lora_alpha": largest, "rank_pattern": pattern, "alpha_pattern": pattern}
    _save(tensors, out, base, settings | {"target_modules": [about[name]["module"] for name in used]})


def write_lora(method: Lora, tensors: dict[str, Tensor], base: str, out: Path) -> None:
    """The adapter of a LoRA run: the fp32 masters of a checkpoint, under PEFT's names. Prints the size first."""
    trained = masters(tensors)
    named = {PREFIX + name.replace(".default", ""): value for name, value in trained.items()}
    named = {name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): v for name, v in named.items()}
    modules = [name.removesuffix(".lora_A.default.weight") for name in trained if ".lora_A." in name]
    pairs = [(named[f"{PREFIX}{name}.lora_A.weight"], named[f"{PREFIX}{name}.lora_B.weight"]) for name in modules]
    layers = {name: (len(a), [len(b), a.shape[1]]) for name, (a, b) in zip(modules, pairs, strict=True)}
    print(size_line(layers, method.magnitude), flush=True)
    settings = {"r": method.rank, "lora_alpha": method.alpha, "use_dora": method.magnitude}
    _save(named, out, base, settings | {"target_modules": modules})


def factors(axis: str, part: dict[str, Tensor], shape: list[int], rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] in fp32 whose product is the change of the weight [out, in]."""
    change = part["new"].float() - part["old"].float()  # [k, in] of rows, [k, out] of columns
    here = torch.arange(len(change))
    a, b = torch.zeros(rank, shape[1]), torch.zeros(shape[0], rank)
    if axis == "row":
        a[here], b[part["index"], here] = change, 1.0
    else:
        a[here, part["index"]], b[:, here] = 1.0, change.t()
    return a, b


def size_line(layers: dict[str, tuple[int, list[int]]], dora: bool = False) -> str:
    """What an adapter of these (rank, weight's shape) will weigh, and how vLLM serves it."""
    values = sum(rank * sum(shape) for rank, shape in layers.values())
    largest = max(rank for rank, _ in layers.values())
    line = f"adapter: {len(layers)} layers, largest rank {largest}, {4 * values / 1e6:.1f} MB; "
    if dora:
        return line + "vLLM has no DoRA: PEFT loads it, for vLLM use model/"
    if largest > VLLM_RANKS[-1]:
        return line + f"vLLM refuses ranks above {VLLM_RANKS[-1]}: PEFT loads it, for vLLM use model/"
    return line + f"vLLM serves it with --max-lora-rank {next(rank for rank in VLLM_RANKS if rank >= largest)}"


def _save(tensors: dict[str, Tensor], out: Path, base: str, settings: dict[str, Any]) -> None:
    from peft import LoraConfig

    config = LoraConfig(base_model_name_or_path=base, task_type="CAUSAL_LM", inference_mode=True, **settings)
    with whole_folder(out) as unfinished:
        whole = {name: value.contiguous() for name, value in tensors.items()}
        save_file(whole, unfinished / "adapter_model.safetensors")
        config.save_pretrained(unfinished)
