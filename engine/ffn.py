"""The FFNs of a model: found by structure, fused, and with chosen slices to train.

`attach` is the one call that makes any Hugging Face model train a NeuronSet, in the engine or in somebody's own
Trainer, Accelerate, DDP or FSDP2 loop. fused.py has the FFN as one function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .errors import UserError
from .fused import FusedFFN
from .slices import SliceLinear, set_submodule


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
    if not sites:
        raise UserError(
            f"{type(model).__name__} has no FFN that this engine knows (gate/up/down or in/out linear layers): "
            "use a Llama, Qwen2, Gemma-2, Mistral, Baichuan2 or BLOOM checkpoint"
        )
    return sites


def checkpoint_sites(folder: Any) -> list[FFNSite]:
    """The FFNs of the model in a Hugging Face folder, by a model without weights."""
    from .models import empty_model

    return find_ffns(empty_model(folder))


def fuse(model: nn.Module, recompute: bool = False) -> list[FusedFFN]:
    """Replace every FFN by a FusedFFN, in place; weights are shared, outputs the same. Returns them in layer order."""
    fused = []
    for site in find_ffns(model):
        ffn = site.module if isinstance(site.module, FusedFFN) else FusedFFN(site, recompute)
        set_submodule(model, site.name, ffn)
        fused.append(ffn)
    return fused


def attach(model: nn.Module, neurons: Any, recompute: bool = False) -> list[nn.Parameter]:
    """Freeze `model` and make the slices of a NeuronSet trainable, in place; returns the parameters to optimise.

    Use it like PEFT's get_peft_model, with any trainer or wrapper; `slices.merge(model)` gives plain layers back.
    Raises UserError if the set was made for another model.
    """
    model.requires_grad_(False)
    fused = fuse(model, recompute)
    if len(fused) != neurons.layers:
        raise UserError(f"the neuron set is of a model of {neurons.layers} layers, this one has {len(fused)}")
    chosen: dict[tuple[int, str], dict[str, Tensor]] = {}
    for (layer, role, axis), index in neurons.slices.items():
        if len(index):
            chosen.setdefault((layer, role), {})["rows" if axis == "row" else "columns"] = index
    params: list[nn.Parameter] = []
    for (layer, role), index in sorted(chosen.items()):
        ffn = fused[layer]
        linear = ffn.projection(role)
        if linear.out_features != neurons.widths[role]:
            raise UserError(
                f"the neuron set's {role} has {neurons.widths[role]} rows, the model's {linear.out_features}"
            )
        sliced = SliceLinear(linear, **index)
        setattr(ffn, ffn.names[role], sliced)
        params += sliced.trainable()
    return params


def _roles(module: nn.Module) -> dict[str, str] | None:
    """Which child plays which role, or None if this is no FFN."""
    if isinstance(module, FusedFFN):
        return module.names
    linears = {n: m for n, m in module.named_children() if isinstance(m, nn.Linear)}
    for names in (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")):
        if set(linears) == set(names):
            return dict(zip(("gate", "up", "down"), names, strict=True))
    if set(linears) == {"dense_h_to_4h", "dense_4h_to_h"}:
        return {"in": "dense_h_to_4h", "out": "dense_4h_to_h"}
    return None


def _activation(module: nn.Module, name: str) -> str:
    if isinstance(module, FusedFFN):
        return module.activation
    function = getattr(module, "act_fn", None) or getattr(module, "gelu_impl", None)
    kind = type(function).__name__
    known = {"SiLUActivation": "silu", "SiLU": "silu", "PytorchGELUTanh": "gelu_tanh", "GELUTanh": "gelu_tanh"}
    known |= {"BloomGelu": "gelu_tanh", "GELUActivation": "gelu", "GELU": "gelu", "NewGELUActivation": "gelu_tanh"}
    if kind not in known:
        raise UserError(f"{name}: activation {kind} is not one of SiLU, GELU or tanh-GELU")
    return known[kind]
