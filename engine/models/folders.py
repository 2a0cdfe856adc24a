"""What is checked of a model folder before a tensor of it is read: it may come from anybody.

No pickle, no code of its own, no file outside the folder; every shard is there and whole; every weight that the
architecture needs is in them with its shape; the FFNs are of a kind that this engine knows.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from ..common.errors import UserError
from ..common.files import first_line, read_json
from ..common.shards import match_names, open_shard, tensor_files
from .shapes import from_config
from .sites import empty_model, find_ffns

CODE_FILES = ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json")


def check(folder: Path) -> None:
    """Raises UserError, one line that names the file, for a folder that cannot be used or should not be."""
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"{folder}: no config.json, so not a Hugging Face model folder")
    _check(folder, config.stat().st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _check(folder: Path, changed: int) -> None:
    for name in CODE_FILES:
        if (folder / name).is_file() and "auto_map" in read_json(folder / name):
            raise UserError(f"{folder / name} asks for code of its own (auto_map): remote code is not run")
    files = tensor_files(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for name in sorted(set(files.values())):
        with open_shard(folder / name) as shard:
            shapes.update({entry.name: entry.shape for entry in shard.entries.values()})
    _structure(folder, shapes)


def _structure(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """The architecture, built without memory: its FFNs are known, its weights are those of the shards."""
    settings = read_json(folder / "config.json")
    try:
        shape = from_config(settings, str(folder / "config.json"))
        layers = int(shape.layers)
    except UserError:
        raise
    except Exception as error:  # transformers checks a config with a dozen kinds of exceptions
        raise UserError(f"{folder}/config.json: {first_line(error)}: download it again") from None
    if not 0 < layers <= len(shapes):
        raise UserError(
            f"{folder}/config.json: {layers} layers, but {len(shapes)} tensors are there: download it again"
        )
    model = _empty(folder)
    find_ffns(model)
    needed = dict(model.named_parameters())  # tied weights once, by their first name
    try:
        names = match_names(needed, shapes)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    for name, parameter in needed.items():
        there, wanted = shapes[names[name]], tuple(parameter.shape)
        if there != wanted:
            raise UserError(
                f"{folder}: {name} is {there}, config.json makes it {wanted}: download the checkpoint again"
            )


def _empty(folder: Path) -> torch.nn.Module:
    try:
        return empty_model(folder)
    except Exception as error:  # transformers refuses a config in a dozen ways
        raise UserError(f"{folder}/config.json: {first_line(error)}: download it again") from None


def check_weights(folder: Path, model: torch.nn.Module) -> None:
    """Raises UserError naming the first weight with a NaN or an infinity in it; one pass over the loaded weights."""
    sums = {name: p.detach().sum(dtype=torch.float32) for name, p in model.named_parameters()}
    if sums and not torch.isfinite(torch.stack([s.to("cpu") for s in sums.values()])).all():
        name = next(name for name, s in sums.items() if not torch.isfinite(s))
        raise UserError(f"{folder}: {name} holds NaN or infinity: the checkpoint is damaged, download it again")
