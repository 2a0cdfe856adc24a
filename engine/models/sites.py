"""The FFNs of a model, found by their structure; a model without memory to ask for names."""

from __future__ import annotations

import copy
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ...kernels.common.activations import value
from ..common.errors import UserError
from ..common.files import read_json
from ..common.private import with_children

BLOCK = re.compile(r"((?:.*\.)?(?:layers|h)\.)(\d+)(\..*)")
"""A tensor of a block: what comes before its number, the number, the rest."""
ATTENTION_OUTPUTS = ("o_proj", "dense")
"""Names of the attention's output projection (Llama's family, BLOOM)."""


@dataclass(frozen=True)
class FFNSite:
    """An FFN found in a model: `projections` maps gate/up/down (or in/out) to the child's name."""

    layer: int
    name: str
    module: nn.Module
    projections: dict[str, str]
    activation: str

    @property
    def gated(self) -> bool:
        return "gate" in self.projections


def find_ffns(model: nn.Module) -> list[FFNSite]:
    """The FFNs of a causal LM, recognised by structure: an MLP whose linear children are gate/up/down or in/out.

    Raises UserError when none is found (mixture-of-experts, packed gate_up projections, other designs).
    """
    sites: list[FFNSite] = []
    for name, module in model.named_modules():
        roles = _roles(module)
        if roles:
            sites.append(FFNSite(len(sites), name, module, roles, _activation(module, name)))
            if not hasattr(module, "roles"):
                _check_forward(sites[-1])
    if not sites:
        raise UserError(
            f"{type(model).__name__} has no FFN that this engine knows (gate/up/down or in/out linear layers): "
            "use a Llama, Qwen2, Gemma-2, Mistral, Baichuan2 or BLOOM checkpoint"
        )
    return sites


def checkpoint_sites(folder: str | os.PathLike[str]) -> list[FFNSite]:
    """The FFNs of the model in a Hugging Face folder, by a model without weights."""
    return find_ffns(empty_model(folder))


def _roles(module: nn.Module) -> dict[str, str] | None:
    """Which child plays which role, or None if this is no FFN."""
    if known := getattr(module, "roles", None):  # a FusedFFN: it says so itself
        return known
    linears = {n: m for n, m in module.named_children() if isinstance(m, nn.Linear)}
    for names in (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")):
        if set(linears) == set(names):
            return dict(zip(("gate", "up", "down"), names, strict=True))
    if set(linears) == {"dense_h_to_4h", "dense_4h_to_h"}:
        return {"in": "dense_h_to_4h", "out": "dense_4h_to_h"}
    return None


def _activation(module: nn.Module, name: str) -> str:
    if isinstance(known := getattr(module, "activation", None), str):  # a FusedFFN
        return known
    function = getattr(module, "act_fn", None) or getattr(module, "gelu_impl", None)
    kind = type(function).__name__
    known = {"SiLUActivation": "silu", "SiLU": "silu", "PytorchGELUTanh": "gelu_tanh", "GELUTanh": "gelu_tanh"}
    known |= {"BloomGelu": "gelu_tanh", "GELUActivation": "gelu", "GELU": "gelu", "NewGELUActivation": "gelu_tanh"}
    if kind not in known:
        raise UserError(f"{name}: activation {kind} is not one of SiLU, GELU or tanh-GELU")
    return known[kind]


def _check_forward(site: FFNSite) -> None:
    """Raises UserError for an FFN that is more than its linear layers and activation: dropout, norm, clamp, factors.

    Its class's own forward runs on a copy with small layers, in training and with large values.
    """
    draw, sizes, small = torch.Generator().manual_seed(0), {"down": (8, 4), "out": (8, 4)}, {}
    with torch.random.fork_rng(devices=[]):  # a new layer draws its values
        for role, child in site.projections.items():
            small[child] = nn.Linear(*sizes.get(role, (4, 8)), device="cpu", dtype=torch.float64)
    for layer in small.values():
        for p in layer.parameters():
            nn.init.normal_(p, generator=draw)
    x = torch.randn(6, 4, dtype=torch.float64, device="cpu", generator=draw) * 10
    *first, last = (small[child] for child in site.projections.values())
    residual = () if site.gated else (torch.zeros_like(x),)
    others = {name: copy.copy(child).train() for name, child in site.module.named_children() if name not in small}
    stub = with_children(site.module, others | small)
    stub.training = True
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        h = value(first[0](x), site.activation)
        expected = last(h * first[1](x) if site.gated else h)
        try:
            same = torch.allclose(type(stub).forward(stub, x, *residual), expected, rtol=1e-3, atol=1e-3)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            same = False
    if not same:
        raise UserError(
            f"{site.name}: {type(stub).__name__} does more than its linear layers and {site.activation} (dropout, a "
            "norm, a clamp, a factor): no FFN that this engine knows; dropout must be 0 in the model's config"
        )


def empty_model(folder: str | os.PathLike[str]) -> nn.Module:
    """The model of a Hugging Face folder without memory: its modules and their names, by its config.json alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = read_json(Path(folder) / "config.json")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), trust_remote_code=False)
