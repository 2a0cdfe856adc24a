"""What SparseColumnAdamW refuses in a parameter group: values out of range, other mathematics. Next: optim.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..common.errors import UserError

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Types of parameters that can be trained."""
OTHERS = {
    "maximize": "give the loss with the other sign",
    "amsgrad": "there is no maximum of second moments here",
    "differentiable": "steps are not differentiable here",
    "capturable": "step() cannot be captured in a CUDA graph",
}
"""Options of torch.optim.AdamW that change what a step is, and what to say where one is on."""


def check_group(group: Mapping[str, Any], where: str = "") -> None:
    """Raises UserError for a value out of range or an option that is not done here; `where` opens the line."""
    for name in ("lr", "betas", "eps", "weight_decay"):
        if name not in group:
            raise UserError(f"{where}no {name}: it must have lr, betas, eps and weight_decay, as AdamW's")
    if not _number(group["lr"], tensor=True) >= 0:
        raise UserError(f"{where}lr {shown(group['lr'])}: must not be negative, a number or a one-element tensor")
    betas = group["betas"]
    pair = isinstance(betas, Sequence) and len(betas) == 2
    if not pair or not all(0 <= _number(beta, tensor=True) < 1 for beta in betas):
        raise UserError(f"{where}betas {shown(betas)}: must be two numbers, each in [0, 1)")
    for name in ("eps", "weight_decay"):
        if not _number(group[name]) >= 0:
            raise UserError(f"{where}{name} {shown(group[name])}: must not be negative, a number")
    if not isinstance(group.get("active", True), bool):
        raise UserError(f"{where}active {group['active']!r}: must be True or False")
    for name, remedy in OTHERS.items():
        if group.get(name):
            raise UserError(f"{where}{name}={group[name]}: not done here, leave it out ({remedy})")
    if not group.get("decoupled_weight_decay", True) and group["weight_decay"]:
        raise UserError(
            f"{where}weight_decay {group['weight_decay']} with decoupled_weight_decay=False, as of torch.optim.Adam: "
            "here decay is decoupled; set weight_decay to 0, or leave decoupled_weight_decay out"
        )


def check_types(params: Sequence[Tensor]) -> None:
    """Raises UserError for parameters of a type that cannot be trained: complex, integer, 8-bit floats."""
    for p in params:
        if p.dtype not in TYPES:
            raise UserError(
                f"parameter of shape {tuple(p.shape)} is {p.dtype}: only float32, bfloat16, float16 and float64 "
                "are trained; leave it out, or convert it (torch.view_as_real for complex values)"
            )


def check_state_dict(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError where a saved state's groups are not as many, of other sizes, or themselves refused."""
    if not ("state" in state_dict and "param_groups" in state_dict):
        raise UserError("optimizer state: no state or no param_groups; load what state_dict() gave")
    saved, own = ([len(group.get("params", ())) for group in each] for each in (state_dict["param_groups"], groups))
    if saved != own:
        raise UserError(
            f"optimizer state: saved of groups with {saved} parameters, here they have {own}; make the groups as then"
        )
    for i, group in enumerate(state_dict["param_groups"]):
        check_group({"active": True, **group}, f"optimizer state, group {i}: ")


def shown(value: Any) -> str:
    """A value for a line: a tensor of several elements by its shape."""
    several = isinstance(value, Tensor) and value.numel() != 1
    return f"a tensor of shape {tuple(value.shape)}" if several else f"{value}"


def _number(value: Any, tensor: bool = False) -> float:
    """A number, with `tensor` also that of a one-element tensor; NaN for anything else, which no range holds."""
    if tensor and isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value)
    return float(value) if isinstance(value, Real) else math.nan
