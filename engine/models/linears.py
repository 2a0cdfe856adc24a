"""Which linear layers of a model can train rows and columns: all that is refused, before anything is changed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from ..common.errors import UserError


def index_in(model: nn.Module, name: str, axis: str, index: Sequence[int] | Tensor) -> Tensor:
    """The rows or columns of the layer `name` as int64. Raises UserError for what is not there."""
    modules = dict(model.named_modules())
    if name not in modules:
        near = get_close_matches(name, [n for n, m in modules.items() if isinstance(m, nn.Linear)], 1, 0.0)
        raise UserError(f"{name!r}: the model has no such layer" + "".join(f"; is it {other!r}?" for other in near))
    if not isinstance(linear := modules[name], nn.Linear):
        raise UserError(f"{name} is a {type(linear).__name__}, not an nn.Linear: name a linear layer")
    size = linear.out_features if axis == "rows" else linear.in_features
    try:
        return checked_index(torch.as_tensor(index), size, axis[:-1])
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def checked_index(index: Tensor, size: int, what: str) -> Tensor:
    """`index` as int64. Raises UserError if it is empty, outside `size`, names one twice, or is no whole numbers."""
    if index.ndim != 1 or len(index) == 0:
        raise UserError(f"{what} index must be a non-empty list, not of shape {tuple(index.shape)}")
    if index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
        raise UserError(f"{what} index is {index.dtype}: give whole numbers (of a mask, mask.nonzero().flatten())")
    index = index.to(torch.int64)
    if int(index.min()) < 0 or int(index.max()) >= size:
        raise UserError(
            f"{what} index {int(index.max() if index.max() >= size else index.min())}: the layer has {size}"
        )
    if len(torch.unique(index)) != len(index):
        raise UserError(f"{what} index holds duplicates: name every {what} once")
    return index


def check_linears(model: nn.Module, names: Iterable[str]) -> None:
    """Raises UserError for layers of which no slices can be trained, and for weights that another layer has too."""
    owners: dict[int, list[str]] = {}
    for owner, module in model.named_modules(remove_duplicate=False):
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append(owner)
    for name in names:
        linear = model.get_submodule(name)
        check_linear(linear, f"{name}: ")
        if others := [other for other in owners[id(linear.weight)] if other != name]:
            raise UserError(f"{name}: its weight is {others[0]}'s too, which would change with it: untie them first")


def check_linear(linear: nn.Linear, where: str = "") -> None:
    """Raises UserError for a layer that is more than a product with its own weight; `where` opens the line."""
    kind = type(linear)
    if "weight" not in dict(linear.named_parameters(recurse=False)):
        raise UserError(f"{where}its weight is made of others (weight_norm, pruning, parametrize): make it plain first")
    if hasattr(linear, "stored"):
        return  # quantised, and it knows its unquantised values (quantised/layers.py)
    if not linear.weight.is_floating_point():
        name = f"{kind.__name__} of {linear.weight.dtype}"
        raise UserError(
            f"{where}{name}: this model is quantised, and slices begin with the unquantised weights: "
            "give their folder too, attach(model, neurons, base=FOLDER)"
        )
    # Accelerate's hooks for a device map only move tensors.
    own = not is_product(linear) or ("forward" in vars(linear) and not hasattr(linear, "_hf_hook"))
    if own or kind is nn.modules.linear.NonDynamicallyQuantizableLinear:  # nn.MultiheadAttention's, never called
        raise UserError(f"{where}a {kind.__name__} that is not used as an nn.Linear: its slices cannot be trained")
    if hasattr(linear.weight, "to_local"):
        raise UserError("the weights are sharded already: choose the slices first, then call fully_shard")
    if linear.weight.is_meta:
        raise UserError(f"{where}its weight is on the meta device: load the model without offloading first")


def is_product(linear: nn.Linear) -> bool:
    """Whether the class of a layer computes x Wᵀ + b; Falcon's does, in other words."""
    return type(linear).forward is nn.Linear.forward or _is_product(type(linear))


@functools.cache
def _is_product(kind: type[nn.Linear]) -> bool:
    """Whether a subclass's own forward is x Wᵀ + b, seen on small values."""
    draw = torch.Generator().manual_seed(0)
    for bias in (True, False):
        with torch.random.fork_rng(devices=[]):
            plain = nn.Linear(3, 2, bias=bias, device="cpu", dtype=torch.float64)
        for p in plain.parameters():
            nn.init.normal_(p, generator=draw)
        x = torch.randn(4, 3, generator=draw, device="cpu", dtype=torch.float64)
        twin = copy.copy(plain)
        twin.__class__ = kind
        try:
            with torch.no_grad():
                if not torch.allclose(kind.forward(twin, x), plain(x), rtol=1e-9, atol=1e-9):
                    return False
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):
            return False
    return True
