"""Bottleneck adapters: two small layers behind the attention and behind the FFN of every block, before the residual.

    y ← y + W_up · gelu(W_down · y + b_down) + b_up          y [.., H], W_down [w, H], W_up [H, w]

Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP" (section 2.1), whose program draws both weights
with deviation 0.001 and starts the biases at zero: the model starts as good as its base. Nothing of this can be merged
into the base's weights, so a run saves what it trained beside the base:

    save(Path("runs/x/attached"), method, base, tensors)
    model = load(Path("runs/x/attached"))         # the base with what was trained attached, ready to decode
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..common.checkpoint import MASTER, masters
from ..common.errors import UserError
from ..common.files import whole_folder
from ..common.settings import as_dict
from ..methods.kinds import method_from
from ..methods.method import Method
from ..models import load as models
from ..models.config import ModelConfig
from ..slices.patches import load_masters

FILE, ABOUT = "attached.safetensors", "attached.json"


def save(folder: Path, method: Method, base: str, fingerprint: str, tensors: dict[str, Tensor]) -> str:
    """Write a checkpoint's masters (fp32) and what `load` has to know; returns a line about it.

    `base` is what --model.path was, `fingerprint` its `models.fingerprint`. The folder appears whole or not at all.
    """
    trained = {name: value.contiguous() for name, value in masters(tensors).items()}
    about = {"format": 1, "base": base, "fingerprint": fingerprint, "method": as_dict(method)}
    with whole_folder(folder) as unfinished:
        save_file(trained, unfinished / FILE)
        (unfinished / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    size = sum(t.numel() for t in trained.values())
    return f"{size:,} trained parameters beside the base ({4 * size / 1e6:.1f} MB): no weight of the base changed"


def load(
    folder: str | Path,
    base: str | None = None,
    config: ModelConfig | None = None,
    device: torch.device | None = None,
    held: models.Held = "whole",
) -> nn.Module:
    """The base with what was trained attached, frozen, in evaluation mode, in the base's dtype.

    `base` is where the base model lies now, where that is not where it lay in training; `held` is load_model's. Raises
    UserError for a folder that `save` did not write and for another base.
    """
    folder = Path(folder)
    about, tensors = _read(folder)
    method = method_from(about["method"])
    if method.merges or not method.trains:
        raise UserError(f"{folder / ABOUT}: {method.title} attaches no adapters: take the folder as the run wrote it")
    base = base or about["base"]
    if models.fingerprint(models.snapshot(base)) != about["fingerprint"]:
        raise UserError(f"{folder}: was not trained on {base}: name the base model that it was trained on")
    config = config or ModelConfig()
    model = models.load_model(base, config, device or torch.device("cpu"), held=held)
    method.prepare(model, None)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if trained != tensors.keys():
        raise UserError(f"{folder / FILE}: does not hold what {ABOUT} says: take the folder as the run wrote it")
    load_masters(model, {MASTER + name: value for name, value in tensors.items()})
    return model.requires_grad_(False).eval()


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        kinds = {"base": str, "fingerprint": str, "method": dict}
        if about["format"] != 1 or not all(isinstance(about[key], kind) for key, kind in kinds.items()):
            raise ValueError("its format is another one")
        return about, load_file(folder / FILE)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder}: not an adapter of a run ({error}): name the attached/ folder of one") from None
