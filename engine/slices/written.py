"""When slices are written into the weights that they are of.

A forward writes them, since any optimizer may have stepped before it (linear.py), or whoever steps does
(`leave_to_optimizer`). Here is the rest: a state dict always leaves with the trained weights, and loading one leaves
weights and slices that agree. A layer here is a SlicedLinear (frozen/layer.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.adamw.op import Writes
from ..common.errors import UserError


class Place(tuple):
    """Where a slice lies, `(weight, index, axis)`: an optimizer that steps writes it there.

    Pickled with a parameter it is empty: an optimizer's file would hold whole weights. The layer sets it again.
    """

    loaded = False
    """Whether other values were loaded since the optimizer's last step."""

    def __reduce__(self) -> tuple:
        return Place, ((None, None, self[2]),)


class Written:
    """Writes all slices of a model into their weights, in one launch on a GPU: call it after every optimizer step."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = [m for m in model.modules() if hasattr(m, "before_forward")]
        self.linked: list[object] = []
        self.writes = Writes([])

    def __call__(self) -> None:
        linked = [layer.linked for layer in self.layers]
        if linked != self.linked:
            parts = [(p, getattr(m, name), index, axis) for m in self.layers for p, name, axis, index in m.slices()]
            self.linked, self.writes = linked, Writes(parts)
        self.writes()


def leave_to_optimizer(model: nn.Module) -> Written:
    """Let forwards and backwards leave the weights alone: whoever steps promises to write the slices into them.

    Without it every forward writes them, since any optimizer may have stepped. Writes them once and returns what does
    it: call that after each step, or let SparseColumnAdamW, whose parameters are the slices themselves, do it. Not
    for ZeRO-3 or FSDP, where a weight is gathered anew.
    """
    written = Written(model)
    for layer in written.layers:
        layer.left = True
    written()
    return written


def keep_current(layer: nn.Module) -> None:
    """Let the layer's state dicts hold the trained weights, and loading give its slices and weights the same values."""
    layer.register_state_dict_post_hook(_before_saving)
    layer.register_load_state_dict_pre_hook(_before_loading)
    layer.register_load_state_dict_post_hook(_after_loading)


def _before_saving(layer: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """A post-hook: by then FSDP2 has put its shards in place. The dict's tensors are those that are written into."""
    write(layer)


def _before_loading(layer: nn.Module, state_dict: dict, prefix: str, *_: Any) -> None:
    """A dict of a plain model has no slices: its weights give them. Else the old ones would be written over it.

    torch.distributed.checkpoint fills such a dict up with the model's own slices: they are taken from the weights too.
    Raises UserError for any other slices that the dict's weights do not have: they are of other rows than this layer's.
    """
    names = {id(p): name for name, p in layer.named_parameters()}
    for parameter, tensor, axis, index in layer.slices():
        key, given, own = prefix + names[id(parameter)], state_dict.get(prefix + tensor), getattr(layer, tensor)
        if given is None or given.is_meta or index.is_meta or given.shape != own.shape or _same_memory(given, own):
            continue  # a part of a checkpoint, values that come later, or what torch refuses by itself
        part = _whole(given.detach()).index_select(axis, index.to(given.device))
        part = part.t().contiguous() if axis else part  # columns are stored as rows
        if key in state_dict and _equal(saved := _whole(state_dict[key].detach()), part):
            continue
        if key in state_dict and not _equal(saved, _whole(parameter.detach())):
            raise UserError(
                f"{key}: the checkpoint trained other {'columns' if axis else 'rows'} of this layer, or in another "
                "order: attach the neurons that it was trained with"
            )
        state_dict[key] = _like(parameter, part)


def _equal(saved: Tensor, part: Tensor) -> bool:
    return saved.shape == part.shape and torch.allclose(saved.to(part), part, rtol=0, atol=0, equal_nan=True)


def _same_memory(given: Tensor, own: Tensor) -> bool:
    """Whether a dict's tensor is the layer's own: it can lack a step that its slices have."""
    return not (is_sharded(given) or is_sharded(own)) and given.data_ptr() == own.data_ptr()


def _after_loading(layer: nn.Module, incompatible_keys: Any) -> None:
    layer.link()  # assign=True puts other parameters in
    for parameter, *_ in layer.parts():
        if hasattr(parameter, "slice_of"):
            parameter.slice_of.loaded = True
    if not any(is_sharded(t) or is_partitioned(t) for t in _tensors(layer)):
        layer.refresh()


@torch.no_grad()
def write(layer: nn.Module) -> None:
    """Write a layer's slices into its weight and bias, wherever they lie.

    Where they are sharded (FSDP2) or partitioned (ZeRO-3) this is a collective: every rank calls it.
    """
    tensors = _tensors(layer)
    if any(t.is_meta for t in tensors):
        return  # Accelerate shards a model without its values, which it loads then
    if any(map(is_partitioned, tensors)):
        with gathered([p for p, *_ in layer.slices()]), gathered([layer.weight, layer.bias], keep=True):
            layer.refresh()
    elif any(map(is_sharded, tensors)):
        for parameter, tensor, axis, index in layer.slices():
            values = _whole(parameter.detach())
            _write_shard(getattr(layer, tensor).detach(), values.t() if axis else values, axis, index)
    else:
        layer.refresh()


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether it is a DTensor: a rank has a part of it, as under FSDP2."""
    return hasattr(tensor, "to_local")


def is_partitioned(tensor: Tensor | None) -> bool:
    """Whether DeepSpeed's ZeRO-3 has it and has not gathered it: it is empty then."""
    return hasattr(tensor, "ds_id") and tensor.numel() == 0


@contextmanager
def gathered(tensors: list[Tensor | None], keep: bool = False) -> Iterator[None]:
    """ZeRO-3's parameters whole in this block; others are as they are. `keep` stores what the first rank wrote."""
    parts = [t for t in tensors if is_partitioned(t)]
    if not parts:
        yield
        return
    from deepspeed import zero

    with zero.GatheredParameters(parts, modifier_rank=0 if keep else None):
        yield


def input_with_gradient(module: nn.Module, args: tuple) -> tuple | None:
    """A forward pre-hook: under ZeRO-3 an input that needs no gradient gets one.

    DeepSpeed ends a module's backward, and reduces a leaf's gradients, when the gradient of its input is there. In a
    frozen model the input of the first module that trains needs none: its weights would stay gathered, and of a leaf
    zeros would be reduced.
    """
    if not args or args[0].requires_grad or not torch.is_grad_enabled():
        return None
    if not hasattr(next(module.parameters()), "ds_id"):
        return None
    return args[0].detach().requires_grad_(), *args[1:]


def _tensors(layer: nn.Module) -> list[Tensor]:
    return [t for parameter, name, *_ in layer.slices() for t in (parameter, getattr(layer, name))]


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def _like(parameter: Tensor, part: Tensor) -> Tensor:
    """A slice's values, whole, sharded where its parameter is."""
    if not is_sharded(parameter):
        return part
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(part, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _write_shard(weight: Tensor, values: Tensor, axis: int, index: Tensor) -> None:
    """weight[index] = values along `axis`, in this rank's part of a DTensor; `values` are whole."""
    numbers = _numbers(weight)
    at, of = (numbers[axis][:, None] == index[None, :]).nonzero(as_tuple=True)
    mine = values.index_select(axis, of)
    for other, own in enumerate(numbers):
        if other != axis:
            mine = mine.index_select(other, own)
    local = weight.to_local()
    local.index_copy_(axis, at, mine.to(local.dtype))


def _numbers(weight: Tensor) -> list[Tensor]:
    """Along each dimension, which numbers of the whole this rank's part has. No communication."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    found = []
    for dim, size in enumerate(weight.shape):
        every = torch.arange(size, device=weight.to_local().device)
        placements = [Shard(0) if p.is_shard(dim) else Replicate() for p in weight.placements]
        found.append(distribute_tensor(every, weight.device_mesh, placements, src_data_rank=None).to_local())
    return found
