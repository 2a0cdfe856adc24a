"""What is checked of a model folder before a tensor of it is read: it may come from anybody.

No pickle, no code of its own, no file outside the folder; every shard is there and whole; every weight that the
architecture needs is in them with its shape; the FFNs are of a kind that this engine knows.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import torch
from torch import nn

from ..common import distributed, private
from ..common.errors import UserError
from ..common.files import read_json
from ..common.shards import FLOATS, Entry, open_shard, tensor_files
from . import kinds, names
from .logits import logit_rule
from .shapes import from_config
from .sites import empty_model, model_without_weights

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|absmax|quant_map|nested_\w+|quant_state\..*|weight_format|weight_packed"
    r"|weight_shape|input_scale|output_scale|\w*_?weight_scale(_inv|_2)?|\w*zero_point)$"
)
"""Names of tensors that only quantised checkpoints have."""
BUFFERS = re.compile(r"(inv_freq|rotary\w*|position_ids|masked_bias|attn\.bias|attention\.bias|alibi)$")
"""Names of tensors of old checkpoints that are no weights, of any dtype."""
CODE_FILES = ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json")


def check(folder: Path) -> None:
    """Raises UserError, one line that names the file, for a folder that cannot be used or should not be."""
    config = folder / "config.json"
    _refuse_files(folder)
    if not config.is_file():
        raise UserError(f"{folder}: no config.json, so not a Hugging Face model folder")
    _check(folder, config.stat().st_mtime_ns)


def _refuse_files(folder: Path) -> None:
    """Raises UserError for files that say that the folder holds something else than a whole plain model."""
    if found := next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None):
        # transformers would attach it without a word, and what is exported would lack it
        raise UserError(
            f"{found}: a PEFT adapter lies in the folder: merge it into its base model "
            "(PeftModel.merge_and_unload, then save_pretrained), or move its files away to take the base alone"
        )
    gguf, plain = sorted(folder.glob("*.gguf")), [*folder.glob("*.safetensors")]
    if gguf and not plain:
        raise UserError(f"{gguf[0]}: GGUF weights are not read: take the model's safetensors checkpoint")


@functools.lru_cache(maxsize=16)
def _check(folder: Path, changed: int) -> None:
    settings = read_json(folder / "config.json")
    for name in CODE_FILES:
        if (folder / name).is_file() and "auto_map" in read_json(folder / name):
            raise UserError(f"{folder / name} asks for code of its own (auto_map): remote code is not run")
    kinds.check(settings, str(folder / "config.json"))
    files = tensor_files(folder)
    entries: dict[str, Entry] = {}
    for name in sorted(set(files.values())):
        with open_shard(folder / name) as shard:
            entries |= shard.entries
    _refuse_quantised(folder, files, entries)
    _structure(folder, settings, {name: entry.shape for name, entry in entries.items()})


def _refuse_quantised(folder: Path, files: dict[str, str], entries: dict[str, Entry]) -> None:
    """Raises UserError for weights that are numbers of a quantisation, whatever config.json says of it."""
    for name, entry in entries.items():
        if entry.dtype not in FLOATS and not BUFFERS.search(name):
            kind = str(entry.dtype).removeprefix("torch.")
        elif QUANTISED.search(name):
            kind = "a scale"
        else:
            continue
        raise UserError(f"{folder / files[name]}: {name} is {kind}, so quantised: take the unquantised checkpoint")


def _structure(folder: Path, settings: dict, shapes: dict[str, tuple[int, ...]]) -> None:
    """The architecture, built without memory: its FFNs and logits are known, its weights are those of the shards."""
    shape = from_config(settings, str(folder / "config.json"))
    if shape.layers > len(shapes):
        raise UserError(
            f"{folder}/config.json: {shape.layers} layers, but {len(shapes)} tensors are there: download it again"
        )
    model = model_without_weights(settings)
    logit_rule(model)
    needed = dict(model.named_parameters())  # tied weights once, by their first name
    keys = _keys(folder, model, needed, shapes)
    for name, parameter in needed.items():
        there, wanted = shapes[keys[name]], tuple(parameter.shape)
        if there != wanted:
            raise UserError(
                f"{folder}: {name} is {there}, config.json makes it {wanted}: download the checkpoint again"
            )


def _keys(folder: Path, model: nn.Module, needed: dict, shapes: dict) -> dict[str, str]:
    """Parameter → its key in the files. Raises UserError for keys under which transformers would not find it.

    It takes a checkpoint with the body's prefix or without it (`model.layers…`, `layers…`); other prefixes are left by
    torch.compile (`_orig_mod.`), DDP (`module.`) or PEFT (`base_model.model.`), and all weights would be random.
    """
    try:
        found = names.match(model, needed, shapes)
        live = names.renamed(model, found.values())
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    prefix, tied = f"{model.base_model_prefix}.", names.aliases(model)
    for name, key in found.items():
        allowed = {body + own for own in (name, *tied.get(name, ())) for body in ("", prefix)}
        if live[key] not in allowed | {own.removeprefix(prefix) for own in allowed}:
            before = key.removesuffix(name) if key.endswith(name) else ""
            what = f"has the prefix {before!r}: rename the keys" if before else "is named otherwise"
            raise UserError(
                f"{folder}: {name} {what} in the checkpoint ({key}), where transformers does not look for it"
            )
    return found


def check_loaded(folder: Path, model: nn.Module, info: dict) -> None:
    """Raises UserError for a weight that was not in the checkpoint and so is random; `info` is transformers' report.

    Raises it too for a head that config.json ties and the checkpoint holds with other values: transformers then has
    two tensors, vLLM and others take the embedding alone, and which one is meant cannot be known.
    """
    lost = sorted(set(info["missing_keys"]) | {str(each) for each in info.get("mismatched_keys", ())})
    if lost:
        raise UserError(
            f"{folder}: {len(lost)} weights of {type(model).__name__} are not in the checkpoint and would be random "
            f"({', '.join(lost[:3])}): download it again, or take one that was saved by save_pretrained"
        )
    for name, others in names.aliases(empty_model(folder)).items():
        if name not in names.aliases(model):
            raise UserError(_untied(folder, name, others[0]))


def check_ties(folder: Path, model: nn.Module, files: dict[str, str]) -> None:
    """Raises the same for a model whose weights are not loaded yet, from the files (key → file) alone."""
    for name, others in names.aliases(model).items():
        for other in (other for other in others if other in files and name in files):
            with open_shard(folder / files[name]) as left, open_shard(folder / files[other]) as right:
                if not torch.equal(left.read(name), right.read(other)):
                    raise UserError(_untied(folder, name, other))


def _untied(folder: Path, name: str, other: str) -> str:
    return (
        f"{folder}: config.json says that {name} and {other} are one tensor (tie_word_embeddings), but the "
        f"checkpoint has two that differ: write false there, or take {other} out of the checkpoint"
    )


def check_weights(folder: Path, model: nn.Module, shared: bool = False) -> None:
    """Raises UserError naming the first weight with a NaN or an infinity in it; one pass over the loaded weights.

    Of a model that the ranks share each looks at its own part, and all of them raise.
    """
    sums = {name: private.part_of(p).detach().sum(dtype=torch.float32) for name, p in model.named_parameters()}
    bad = ""
    if sums and not torch.isfinite(torch.stack([s.to("cpu") for s in sums.values()])).all():
        bad = next(name for name, s in sums.items() if not torch.isfinite(s))
    if shared:
        bad = next(filter(None, distributed.collect(bad)), "")
    if bad:
        raise UserError(f"{folder}: {bad} holds NaN or infinity: the checkpoint is damaged, download it again")
