"""The FFNs of a model, found by their structure; a model without memory to ask for names.

    sites = checkpoint_sites("models/llama")
    sites[3].child("gate"), sites[3].first("up")      # the child's name, and the projection's first row in its weight

Next: probe.py, which finds out what a module with two or three linear layers computes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..common.errors import UserError
from ..common.files import read_json
from . import probe

BLOCK = re.compile(r"((?:[^.]+\.)*?)(\d+)(\..*)")
"""A module or tensor of a block: what comes before its number, the number, the rest."""
ATTENTION_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
"""Names that an attention's output projection has."""
EXPERTS = re.compile(r"Experts?$|Moe(?!nt)|MoE")
"""In the name of a module's class: a mixture of experts."""


@dataclass(frozen=True)
class FFNSite:
    """An FFN found in a model: `projections` maps gate/up/down (or in/out) to the child's name.

    Where gate and up are packed in one weight [2I, H] (Phi-3, GLM-4), both name the same child.
    """

    layer: int
    name: str
    module: nn.Module
    projections: dict[str, str]
    activation: str

    @property
    def gated(self) -> bool:
        return "gate" in self.projections

    @property
    def packed(self) -> bool:
        return self.gated and self.projections["gate"] == self.projections["up"]

    @property
    def block(self) -> str:
        """The name of the block that it is in."""
        found = BLOCK.fullmatch(self.name)
        return f"{found[1]}{found[2]}" if found else self.name.rpartition(".")[0]

    def child(self, role: str) -> str:
        """The full name of the linear layer that a projection lies in."""
        return f"{self.name}.{self.projections[role]}".lstrip(".")

    def layers(self) -> list[str]:
        """Full names of its linear layers, each once, the last one last."""
        return list(dict.fromkeys(map(self.child, self.projections)))

    def linear(self, role: str) -> nn.Linear:
        return getattr(self.module, self.projections[role])

    def units(self) -> int:
        """I, the width of h."""
        return self.linear(list(self.projections)[-1]).in_features

    def width(self, role: str) -> int:
        """Output channels of a projection."""
        return self.units() if role in ("gate", "up") else self.linear(role).out_features

    def first(self, role: str) -> int:
        """The row of its layer's weight at which a projection begins."""
        return self.units() if self.packed and role == "up" else 0


def find_ffns(model: nn.Module) -> list[FFNSite]:
    """The FFNs of a causal LM, recognised by structure (probe.py), whatever their layers are called.

    Raises UserError where there are none, for a mixture of experts, for a block without one, and for an FFN that is
    more than its linear layers and activation.
    """
    sites: list[FFNSite] = []
    for name, module in model.named_modules():
        if EXPERTS.search(type(module).__name__) and name:
            raise UserError(f"{type(model).__name__} is a mixture of experts: use a dense model")
        found = probe.known(module) or probe.probe(module, name)
        if found:
            sites.append(FFNSite(len(sites), name, module, found.projections, found.activation))
    if not sites:
        raise UserError(
            f"{type(model).__name__} has no FFN that this engine knows: two or three nn.Linear in one module, gated or "
            "not, with SiLU, GELU, ReLU or ReLU²; use a decoder such as Llama, Qwen, Gemma or Phi"
        )
    _check_blocks(model, sites)
    return sites


def _check_blocks(model: nn.Module, sites: list[FFNSite]) -> None:
    """Raises UserError for a block without an FFN that is known, or with two: layers could not be numbered."""
    blocks = [site.block for site in sites]
    if found := BLOCK.fullmatch(sites[0].name):
        path = found[1].rstrip(".")
        wanted = [f"{path}.{number}".lstrip(".") for number, _ in enumerate(model.get_submodule(path).children())]
        other = next((block for block in wanted if blocks.count(block) != 1), None)
        if other or len(wanted) != len(blocks):
            other = other or next(block for block in blocks if block not in wanted)
            raise UserError(
                f"{type(model).__name__}: {other} has not one FFN that this engine knows: use a dense model"
            )


def rows_in_layer(site: FFNSite, slices: dict[tuple[str, str], torch.Tensor]) -> dict[tuple[str, str], torch.Tensor]:
    """Slices of one FFN's projections, (projection, axis) → index, as slices of its layers: (full name, axis) → index.

    They are each other's but where gate and up are packed: there gate's rows come first, then up's, each ascending.
    """
    found: dict[tuple[str, str], torch.Tensor] = {}
    for role in site.projections:
        for axis in ("row", "column"):
            index = slices.get((role, axis))
            if index is None or not len(index):
                continue
            key, moved = (site.child(role), axis), index + site.first(role) if axis == "row" else index
            found[key] = torch.cat([found[key], moved]) if key in found else moved
    return found


def layer_slices(
    sites: Iterable[FFNSite], slices: dict[tuple[int, str, str], torch.Tensor]
) -> dict[tuple[str, str], torch.Tensor]:
    """All slices of a NeuronSet as slices of linear layers: (full name, `row` or `column`) → int64 index.

    In the order of the model. Raises UserError for a layer or projection that the model has not.
    """
    by_layer: dict[int, dict[tuple[str, str], torch.Tensor]] = {}
    for (layer, role, axis), index in slices.items():
        by_layer.setdefault(layer, {})[role, axis] = index
    found: dict[tuple[str, str], torch.Tensor] = {}
    known = {site.layer: site for site in sites}
    for layer, own in sorted(by_layer.items()):
        if layer not in known or not {role for role, _ in own} <= known[layer].projections.keys():
            role = next(iter(own))[0]
            raise UserError(f"no {role} projection in layer {layer}: the neuron set is of another model")
        found |= rows_in_layer(known[layer], own)
    return found


def attention_output(linears: Iterable[str], ffn: Iterable[str]) -> str | None:
    """Of the names of a block's linear layers, its attention's output projection; None where none or two can be it."""
    found = [name for name in linears if name not in ffn and name.rpartition(".")[2] in ATTENTION_OUTPUTS]
    return found[0] if len(found) == 1 else None


def attention_output_of(model: nn.Module, site: FFNSite) -> str:
    """The same of the block that an FFN is in. Raises UserError where there is none."""
    inside = [name for name, m in model.get_submodule(site.block).named_modules() if isinstance(m, nn.Linear)]
    ffn = [name.removeprefix(f"{site.block}.") for name in site.layers()]
    if found := attention_output(inside, ffn):
        return found
    raise UserError(no_output(site.block, inside, ffn, "this method"))


def no_output(where: str, linears: Iterable[str], ffn: Iterable[str], who: str) -> str:
    """What is said where `attention_output` finds none."""
    names = ", ".join(name for name in linears if name not in ffn) or "no linear layer"
    return (
        f"{where}: no output projection of the attention among its layers ({names}): {who} needs one of "
        f"{', '.join(ATTENTION_OUTPUTS)}"
    )


def checkpoint_sites(folder: str | os.PathLike[str]) -> list[FFNSite]:
    """The FFNs of the model in a Hugging Face folder, by a model without weights."""
    return find_ffns(empty_model(folder))


def empty_model(folder: str | os.PathLike[str]) -> nn.Module:
    """The model of a Hugging Face folder without memory: its modules and their names, by its config.json alone."""
    return model_without_weights(read_json(Path(folder) / "config.json"))


def model_without_weights(settings: dict) -> nn.Module:
    """The same of a parsed config.json."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), trust_remote_code=False)
