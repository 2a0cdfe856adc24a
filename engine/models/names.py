"""Names of a model's tensors, and the keys that they have in its files.

    keys = stored_names("models/pythia", ["lm_head.weight"], tensor_files("models/pythia"))   # {…: "embed_out.weight"}

transformers renames some keys while it loads (GPT-NeoX's `embed_out` is the model's `lm_head`). Here are its own rules.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from ..common.errors import UserError
from ..common.shards import match_names
from .sites import empty_model


def renamed(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Key in a file → the name under which transformers loads it into `model`, but for the body's prefix.

    Raises UserError for a key whose tensor is another one in the model, cut or joined.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    rules, found = get_model_conversion_mapping(model), {}
    for key in keys:
        name = key
        for rule in rules:
            name, matched = rule.rename_source_key(name)
            if matched is not None and hasattr(rule, "operations"):
                raise UserError(
                    f"{key}: transformers makes other tensors of it while loading: save the model anew, "
                    "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW, save_original_format=False)"
                )
        found[key] = name
    return found


def match(model: nn.Module, names: Iterable[str], keys: Iterable[str]) -> dict[str, str]:
    """Name of a tensor of `model` → its key in the files; a tied one may be stored under its other name alone.

    Raises UserError where a name has no or two keys.
    """
    keys, other = list(keys), aliases(model)
    live = {name: key for key, name in renamed(model, keys).items()}
    stored = {name: next((o for o in other.get(name, ()) if name not in live and o in live), name) for name in names}
    found = match_names([name for name in stored.values() if name not in keys], live)
    return {name: own if own in keys else live[found[own]] for name, own in stored.items()}


def stored_names(folder: str | os.PathLike[str], names: Iterable[str], keys: Iterable[str]) -> dict[str, str]:
    """The same of the model in a folder. Raises UserError that names the folder."""
    try:
        return match(empty_model(folder), names, keys)
    except UserError as error:
        raise UserError(f"{Path(folder)}: {error}") from None


def aliases(model: nn.Module) -> dict[str, list[str]]:
    """Name of a parameter that several modules share → the other names that it has in the state dict."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in model.state_dict(keep_vars=True).items():
        names[id(tensor)].append(name)
    first = {id(p): name for name, p in model.named_parameters()}
    shared = {first[key]: own for key, own in names.items() if key in first and len(own) > 1}
    return {name: [other for other in own if other != name] for name, own in shared.items()}
