"""What SparseColumnAdamW takes, values of groups and types of parameters, and what it keeps of a parameter: made anew,
or taken from what was saved. Next: optim.py.

- step: float32, of no dimension, on the CPU.
- exp_avg, exp_avg_sq: shaped as the parameter; float32 (float64 for float64 ones), or int8 and uint8 codes.
- exp_avg_absmax, exp_avg_sq_absmax, with codes only: float32, one for each 256 elements.
- master, for bfloat16 and float16 parameters: their float32 values.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ...kernels.adamw.reference import BLOCK
from ..common.errors import UserError
from .kept import COUNT

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Types of parameters that can be trained."""
OTHERS = {
    "maximize": "give the loss with the other sign",
    "amsgrad": "there is no maximum of second moments here",
    "differentiable": "steps are not differentiable here",
    "capturable": "step() cannot be captured in a CUDA graph",
}
"""Options of torch.optim.AdamW that change what a step is, and what to say where one is on."""
MAXIMA = ("exp_avg_absmax", "exp_avg_sq_absmax")


def local(t: Tensor) -> Tensor:
    """This rank's part of a DTensor (FSDP2); any other tensor as it is."""
    return t.to_local() if hasattr(t, "to_local") else t


def has_master(p: Tensor, master: bool) -> bool:
    return master and p.dtype in (torch.bfloat16, torch.float16)


def layout(p: Tensor, moments: str, master: bool) -> dict[str, torch.dtype]:
    """The tensors in a parameter's state beside its count, and their types."""
    if moments == "8bit":
        types = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8} | dict.fromkeys(MAXIMA, torch.float32)
    else:
        types = dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.float64 if p.dtype == torch.float64 else torch.float32)
    return types | ({"master": torch.float32} if has_master(p, master) else {})


def fresh(p: Tensor, moments: str, master: bool) -> dict[str, Tensor]:
    """The state before the first step. Raises UserError for a parameter that cannot have one."""
    check_form(p, master)
    state = {COUNT: torch.zeros((), dtype=torch.float32)}
    for name, dtype in layout(p, moments, master).items():
        if name == "master":
            state[name] = p.detach().float().clone()
        elif name in MAXIMA:
            state[name] = zero_maxima(p)
        else:
            state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)
    return state


def check_form(p: Tensor, master: bool) -> None:
    """Raises UserError for a parameter that is not contiguous, and for a float16 one without a master."""
    if not p.is_contiguous():
        raise UserError(f"parameter of shape {tuple(p.shape)}: not contiguous; pass a contiguous one")
    if p.dtype == torch.float16 and not master:
        raise UserError("float16 parameter without a master: use master=True, or bfloat16 for stochastic rounding")


def adopt(p: Tensor, master: Tensor) -> None:
    """Take the parameter's value where the master does not round to it: where somebody has loaded other weights."""
    own = local(p).detach()
    master.copy_(torch.where(master.to(own.dtype) == own, master, own.float()))


def zero_maxima(p: Tensor) -> Tensor:
    """Zeros for the absolute maxima of the 8-bit moments of p: float32 [blocks].

    Of a DTensor they are a DTensor [shards of each dimension of p, blocks of the largest shard], of which each rank
    has its own blocks: a checkpoint would take a plain tensor for the same on all ranks, and keep one rank's.
    """
    if not hasattr(p, "to_local"):
        return torch.zeros(-(-p.numel() // BLOCK), device=p.device)
    from torch.distributed.tensor import DTensor, Replicate, Shard

    shards, largest = [1] * p.ndim, list(p.shape)
    for size, placement in zip(p.device_mesh.shape, p.placements, strict=True):
        if not placement.is_replicate():
            shards[placement.dim] *= size
            largest[placement.dim] = -(-largest[placement.dim] // size)
    shape = torch.Size([*shards, -(-math.prod(largest) // BLOCK)])
    own = torch.zeros((1,) * p.ndim + shape[-1:], device=local(p).device)
    placements = [Replicate() if placement.is_replicate() else Shard(placement.dim) for placement in p.placements]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(own, p.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def own_maxima(state: Mapping[str, Tensor], name: str, p: Tensor) -> Tensor | None:
    """The maxima of this rank's blocks, [blocks]; None where moments are not in 8 bits."""
    maxima = state.get(name)
    if maxima is None or not hasattr(maxima, "to_local"):
        return maxima
    return maxima.to_local().view(-1)[: -(-local(p).numel() // BLOCK)]


def restored(saved: Mapping[str, Any], p: Tensor, name: Any, moments: str, master: bool) -> dict[str, Any]:
    """A copy of parameter `name`'s saved state, on p's device and else exactly as it is; the count as it is kept.

    Raises UserError, before anything is copied, for a state that this optimizer would not have kept of p.
    """
    check_form(p, master)
    types, where = layout(p, moments, master), f"optimizer state of parameter {name}"
    _check_kind(saved, types, where, f"moments={moments!r}, master={master}")
    if missing := [key for key in (COUNT, *types) if key not in saved]:
        raise UserError(f"{where}: no {', '.join(missing)}; load what state_dict() gave, whole")
    for key, dtype in types.items():
        value, like = saved[key], zero_maxima(p) if key in MAXIMA else p
        if not isinstance(value, Tensor) or value.dtype != dtype:
            what = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"{where}: {key} is {what}, not {dtype}; load what state_dict() gave, with its types")
        if value.shape != like.shape:
            remedy = "load the state of this model's parameters, in their order and with as many shards"
            raise UserError(f"{where}: {key} has shape {tuple(value.shape)}, not {tuple(like.shape)}; {remedy}")
        if _place(value) != _place(like):
            remedy = "use torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
            raise UserError(f"{where}: {key} is not sharded as the parameter; {remedy}")
    count = _count(saved[COUNT], where)
    return {key: count if key == COUNT else _copied(value, p) for key, value in saved.items()}


def _check_kind(saved: Mapping[str, Any], types: Mapping[str, torch.dtype], where: str, settings: str) -> None:
    """Raises UserError for moments of another type, or a master too many or too few."""
    if not isinstance(saved.get("exp_avg"), Tensor):
        return
    was, own = (
        (dtype, "a" if "master" in keys else "no")
        for dtype, keys in ((saved["exp_avg"].dtype, saved), (types["exp_avg"], types))
    )
    if was != own:
        kinds = [f"{dtype} moments, {article} master" for dtype, article in (was, own)]
        half = was[0] in (torch.bfloat16, torch.float16)  # torch.optim.AdamW's
        remedy = "train float32 parameters with it" if half else "use the settings and types it was saved with"
        raise UserError(f"{where}: saved with {kinds[0]}; {settings} has {kinds[1]}: {remedy}")


def _place(t: Tensor) -> tuple:
    """How a DTensor is sharded, and what this rank has of it."""
    return (tuple(t.placements), local(t).shape) if hasattr(t, "to_local") else ()


def _count(value: Any, where: str) -> Tensor:
    """A count of steps, a number or a one-element tensor anywhere, as it is kept."""
    try:
        count = float(value)
    except (TypeError, ValueError, RuntimeError):
        count = math.nan
    if not 0 <= count < math.inf:
        raise UserError(f"{where}: {COUNT} is {shown(value)}; it must be the number of past steps")
    return torch.tensor(count, dtype=torch.float32)


def _copied(value: Any, p: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    value = value.detach().to(local(p).device, copy=True)
    return value if value.is_contiguous() else value.contiguous()


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
            f"optimizer state: saved of groups with {saved} parameters, here they have {own}; attach the same neurons "
            "first, and make the groups as then"
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
