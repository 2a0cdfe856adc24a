"""The FFNs of a model: found by structure, fused, and with chosen slices to train.

`attach` is the one call that makes any Hugging Face model train a NeuronSet, in the engine or in somebody's own
Trainer, Accelerate, DDP, FSDP2 or DeepSpeed loop. `save` writes the trained model as a plain one, `merge` makes it one.
fused.py has the FFN as one function.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import UserError
from ..common.files import MODE
from ..models.linears import check_linear, check_linears
from ..models.quantised.layers import is_quantised, layers
from ..models.quantised.stored import remember
from ..models.sites import FFNSite, find_ffns, layer_slices
from .frozen.layer import SlicedLinear
from .fused import FusedFFN
from .linear import BOTH, SliceLinear, refuse_slices, slice_linear
from .written import gathered, is_sharded


def fuse(model: nn.Module, recompute: bool = False) -> list[FusedFFN]:
    """Replace every FFN by a FusedFFN, in place; weights are shared, outputs the same. Returns them in layer order."""
    fused = []
    for site in find_ffns(model):
        ffn = site.module if isinstance(site.module, FusedFFN) else FusedFFN(site, recompute)
        model.set_submodule(site.name, ffn)
        fused.append(ffn)
    return fused


def attach(
    model: nn.Module, neurons: Any, recompute: bool = False, base: str | os.PathLike[str] | None = None
) -> list[nn.Parameter]:
    """Freeze `model` and make the slices of a NeuronSet trainable, in place; returns the parameters to optimise.

    Use it like PEFT's get_peft_model, before a trainer or wrapper takes the model: FSDP2, DDP, DeepSpeed. Its
    `state_dict()` is the trained model at any time; `save` writes it as a plain one, `slices.merge(model)` makes it
    one. Of a model that bitsandbytes has quantised `base` is the folder of the unquantised one: slices begin with its
    values, and `save` writes them into it. Raises UserError if the set was made for another model, if the model trains
    slices already, and for FFNs and layers that are more than they seem (find_ffns, check_linears); the model is then
    as it was.
    """
    if not isinstance(model, nn.Module) or not hasattr(neurons, "slices"):
        raise UserError("attach takes a model and a NeuronSet: attach(model, NeuronSet.load(file))")
    refuse_slices(model)
    if base is not None:
        remember(model, base)
    sites = find_ffns(model)
    if len(sites) != neurons.layers:
        raise UserError(f"the neuron set is of a model of {neurons.layers} layers, this one has {len(sites)}")
    for site in sites:
        _check_site(site, neurons)
    chosen: dict[str, dict[str, Tensor]] = {}
    for (name, axis), index in layer_slices(sites, neurons.slices).items():
        chosen.setdefault(name, {})["rows" if axis == "row" else "columns"] = index
    if twice := [name for name, index in chosen.items() if len(index) > 1]:
        raise UserError(f"{twice[0]}: {BOTH}")
    check_linears(model, chosen)
    for site in sites:
        _check_layers(site)
    model.requires_grad_(False)
    fused = fuse(model, recompute)
    params: list[nn.Parameter] = []
    for site, ffn in zip(sites, fused, strict=True):
        ffn.gate_rows = len(neurons.slices.get((site.layer, "gate", "row"), ()))
        named = dict.fromkeys(map(site.child, sorted(site.projections)))  # the order of the optimizer's random numbers
        for name in (name for name in named if name in chosen):
            params += slice_linear(ffn, name.rpartition(".")[2], **chosen[name]).trainable()
    if is_quantised(model):
        _train_on_quantised(model)
    return params


def _train_on_quantised(model: nn.Module) -> None:
    """Let Trainer train a model that transformers has quantised, and let whoever saves it write what `save` writes.

    transformers would write the numbers of the quantisation, under names that no other model has.
    """
    model.is_quantized = False
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = functools.partial(_save_plain, model)


def _save_plain(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    state_dict: Any = None,
    is_main_process: bool = True,
    **more: Any,
) -> None:
    """In the place of a model's save_pretrained, whose other options it takes: what is saved is whole and plain.

    A trainer's state dict has the numbers of the quantisation: it is not looked at.
    """
    _save(model, save_directory, **more)


def merge(model: nn.Module) -> nn.Module:
    """Make the model plain again, in place, with the trained values; returns it.

    Its own FFNs and linear layers come back, the objects that `attach` or `slice_linears` took out, so hooks, PEFT,
    tracing and quantisation work as before. They stay frozen: `model.requires_grad_(True)` trains all of it. Raises
    UserError where the weights are sharded or quantised: there `ffn.save` writes the model.
    """
    _refuse_routed(model)
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, SliceLinear | FusedFFN)]
    if any(isinstance(module, SliceLinear) and module.frozen is not None for _, module in found):
        raise UserError("the model is quantised: ffn.save(model, folder) writes it in full precision")
    if any(is_sharded(p) or hasattr(p, "ds_id") for _, module in found for p in module.parameters()):
        raise UserError("the model's weights are sharded: ffn.save(model, folder) writes it as a plain one")
    for name, module in found:
        if not name:
            return module.plain()
        if model.get_submodule(name) is module:  # the layers of an FFN have gone with it
            model.set_submodule(name, module.plain())
    return model


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the trained model as a plain Hugging Face folder: every program loads it as it loads the base model.

    One that trains on a quantised base is written unquantised, in the model's dtype, which the host's memory must hold.
    The model goes on training. It may be wrapped by DDP, FSDP2, DeepSpeed, Accelerate or torch.compile. Where it is
    sharded every rank calls this, and the first one writes. The tokenizer is yours to save. Raises UserError for a
    model without `save_pretrained`, for PEFT's, FSDP1's and LANDeRMT's, and if `folder` is a file.
    """
    _save(model, folder)


def _save(model: nn.Module, folder: str | os.PathLike[str], **options: Any) -> None:
    """`options` are save_pretrained's."""
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise UserError("FSDP1 cuts weights into flat parts: use FSDP2 (fully_shard; Accelerate's fsdp_version: 2)")
    model = unwrapped(model)
    if hasattr(model, "peft_config"):
        raise UserError("the model has PEFT's adapters: merge them first (model.merge_and_unload())")
    if not hasattr(model, "save_pretrained"):
        raise UserError(f"{type(model).__name__} has no save_pretrained: slices.merge(model) makes its layers plain")
    if Path(folder).is_file():
        raise UserError(f"{folder} is a file: name a folder")  # save_pretrained would log it and write nothing
    tensors = plain_state(model)
    if _first_rank():
        with _plain_config(model):
            model.save_pretrained(folder, state_dict=tensors, **options)
        _finish(Path(folder))


@contextmanager
def _plain_config(model: nn.Module) -> Iterator[None]:
    """The model without what transformers has noted of its quantisation, which save_pretrained would write, and with
    its class's own save_pretrained in the place of ours.
    """
    noted = [(vars(model.config), "quantization_config"), (vars(model), "hf_quantizer")]
    noted += [(vars(model), "save_pretrained")] if is_quantised(model) else []
    taken = [(place, name, place.pop(name)) for place, name in noted if name in place]
    try:
        yield
    finally:
        for place, name, value in taken:
            place[name] = value


def _finish(folder: Path) -> None:
    """Take out what an earlier save left, which a program could load instead; open the files to all readers."""
    shards = [*folder.glob("model-*-of-*.safetensors")]  # an earlier save's are gone already
    stale = "model.safetensors" if shards else "model.safetensors.index.json"
    (folder / stale).unlink(missing_ok=True)
    for file in shards or [folder / "model.safetensors"]:
        file.chmod(MODE)  # safetensors' writer lets nobody else read its files


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DDP, a DeepSpeed engine, Accelerate's wrappers or torch.compile."""
    while inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None):
        model = inner
    return model


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model as a plain one: trained values, whole, no slice parameters.

    Where the weights are sharded it is a collective; whole tensors are then on the CPU of the first rank, and the
    others get an empty dict.
    """
    _refuse_routed(model)
    state = model.state_dict(keep_vars=True)
    own = {id(p) for module in model.modules() if isinstance(module, SliceLinear) for p in module.trainable()}
    # Layers that torch.compile has wrapped one by one have its name in theirs.
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items() if id(tensor) not in own}
    if is_quantised(model):
        return _unquantised(model, state)
    if not any(is_sharded(tensor) or hasattr(tensor, "ds_id") for tensor in state.values()):
        return {name: tensor.detach() for name, tensor in state.items()}
    whole: dict[int, Tensor | None] = {}
    for tensor in state.values():
        if id(tensor) not in whole:  # a tied tensor once
            with gathered([tensor]), torch.no_grad():
                value = tensor.full_tensor() if is_sharded(tensor) else tensor
                whole[id(tensor)] = value.detach().cpu().clone() if _first_rank() else None
    return {name: whole[id(tensor)] for name, tensor in state.items()} if _first_rank() else {}


def _unquantised(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with the unquantised weights of quantised layers, trained slices in them, on the CPU."""
    found = {name: tensor.detach().cpu() for name, tensor in state.items()}
    for name, layer in layers(model):
        owner = model.get_submodule(name.rpartition(".")[0])
        sliced = isinstance(owner, SlicedLinear)
        own = name.removesuffix(".frozen") if sliced else name
        found = {key: t for key, t in found.items() if not key.startswith(f"{name}.") or key == f"{own}.bias"}
        if not hasattr(layer, "stored"):
            raise UserError(
                f"{own} is quantised, and where its unquantised weight lies is not known: attach with base="
            )
        weight = layer.stored.whole()
        for p, tensor, axis, index in owner.parts() if sliced else ():
            if tensor == "weight":
                values = p.detach().cpu().to(weight.dtype)
                weight.index_copy_(axis, index.cpu(), values.t() if axis else values)
        found[f"{own}.weight"] = weight
    return found


def _refuse_routed(model: nn.Module) -> None:
    """Raises UserError for a model whose slices belong to language pairs: all of them at once are another model."""
    for name, module in model.named_modules():
        if hasattr(module, "before_forward") and not isinstance(module, SliceLinear):
            raise UserError(f"{name} is routed by language pair (LANDeRMT): `slicetune fold` writes a plain model")


def _first_rank() -> bool:
    """Of the process group: somebody's own loop may have started its ranks without torchrun's variables."""
    return not (
        torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank()
    )


def _check_layers(site: FFNSite) -> None:
    """Raises UserError for layers that are more than products, trained or not: an attached FFN calls none."""
    for name in site.layers():
        check_linear(getattr(site.module, name.rpartition(".")[2]), f"{name}: ")


def _check_site(site: FFNSite, neurons: Any) -> None:
    """Raises UserError where an FFN is not of the neuron set's shape."""
    if site.projections.keys() != neurons.widths.keys():
        names = " ".join(neurons.widths), " ".join(site.projections)
        raise UserError(f"the neuron set is of FFNs with {names[0]}, the model's have {names[1]}: choose neurons of it")
    for role in site.projections:
        ours, its = (neurons.widths[role], neurons.fan_in[role]), (site.width(role), site.linear(role).in_features)
        if ours != its:
            shapes = [f"{rows} rows of {width}" for rows, width in (ours, its)]
            raise UserError(f"the neuron set's {role} has {shapes[0]}, the model's {shapes[1]}: choose neurons of it")
