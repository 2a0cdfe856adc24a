"""What lies beside the weights of an export: config.json, the generation config, the tokenizer's files.

They decide as much as the weights what a model computes and writes, and no logits of a few short rows show a window, a
scaling of long rows or an end token. Next: audit.py.
"""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

from ..common.files import read_json
from ..methods.expansion import Expansion
from . import generation
from .model import COPIED

CONFIG = "config.json"
OF_STORING = ("dtype", "torch_dtype", "transformers_version", "architectures", "name_or_path", "use_cache")
"""Fields that say how a model was stored, not what it computes."""


def changed_config(base: Path, model: Path, expansion: Expansion | None) -> list[str]:
    """Fields of config.json by which the export computes otherwise than its base (with the blocks that are added)."""
    settings = read_json(base / CONFIG)
    old, new = _computed(expansion.config(settings) if expansion else settings), _computed(read_json(model / CONFIG))
    return [
        f"{CONFIG}: {name} is {new.get(name)!r}, the base's {old.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def changed_files(base: Path, model: Path) -> list[str]:
    """Files that a run copies and that are not the base's any more; of the generation config it adds end tokens."""
    found = []
    for path in sorted({path for pattern in COPIED for path in base.glob(pattern) if path.is_file()}):
        copy = model / path.name
        if path.name not in (CONFIG, generation.FILE) and not (copy.is_file() and filecmp.cmp(path, copy, False)):
            found.append(f"{path.name} is not the base's")
    if generation.settings(base) != generation.settings(model):
        found.append(f"{generation.FILE} is not the base's")
    if lost := set(generation.ends(base)) - set(generation.ends(model)):
        found.append(f"{generation.FILE}: eos_token_id lacks {', '.join(map(str, sorted(lost)))}")
    return found


def _computed(settings: dict[str, Any]) -> dict[str, Any]:
    """As transformers reads it, defaults and renamed fields included."""
    from transformers import AutoConfig

    whole = AutoConfig.for_model(**settings).to_dict()
    return {name: value for name, value in whole.items() if name.lstrip("_") not in OF_STORING}
