"""generation_config.json of an exported model: where plain `generate` stops.

The file is changed as JSON: transformers refuses to save some that it loads (a temperature without sampling).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.files import read_json, write_json

FILE = "generation_config.json"
OF_MODEL = ("bos_token_id", "eos_token_id", "pad_token_id")
"""What transformers takes from config.json where there is no generation config."""


def ends(folder: Path) -> list[int]:
    """The tokens at which plain `generate` stops."""
    listed = _own(folder).get("eos_token_id", [])
    return list(listed) if isinstance(listed, list) else [listed]


def settings(folder: Path) -> dict[str, Any]:
    """What it says beside the end tokens."""
    aside = ("eos_token_id", "transformers_version", "_from_model_config")
    return {key: value for key, value in _own(folder).items() if key not in aside}


def change(folder: Path, more: Sequence[int] = (), fewer: Sequence[int] = ()) -> None:
    """Put `more` behind the end tokens of the model in `folder` and take `fewer` out; all else stays as it is."""
    before = ends(folder)
    after = [*(end for end in before if end not in fewer), *(end for end in more if end not in before)]
    if after != before:
        # A file that says so may be made anew from config.json when the model is loaded.
        kept = {key: value for key, value in _own(folder).items() if key != "_from_model_config"}
        write_json(folder / FILE, kept | {"eos_token_id": after}, indent=2)


def _own(folder: Path) -> dict[str, Any]:
    """The file's settings, before them what config.json says."""
    config, own = (read_json(path) if path.is_file() else {} for path in (folder / "config.json", folder / FILE))
    given = {key: config[key] for key in OF_MODEL if config.get(key) is not None}
    return given | {key: value for key, value in own.items() if value is not None or key not in OF_MODEL}
