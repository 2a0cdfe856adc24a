"""A model trained in somebody's own loop and saved with no forward after its last step, in every way that people save.

`distance` is what a plain model that loads the file is away from the live one: the largest difference of a logit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import toys
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from transformers import LlamaForCausalLM

from slicetune.engine import ffn, slices

STEPS = 3
OWN = ("rows", "columns", "bias_rows")
"""What a slice's parameter is called in a state dict."""


def sliced(
    kind: str, dtype: torch.dtype = torch.float32, model: nn.Module | None = None
) -> tuple[nn.Module, list[nn.Parameter]]:
    """The toy with slices to train: `rows`, `columns` (units) of a neuron set, or `linears` named one by one."""
    model = toys.model(dtype=dtype) if model is None else model
    if kind == "linears":
        names = {"model.layers.0.self_attn.q_proj": [3, 1]}, {"model.layers.1.mlp.down_proj": [0, 46]}
        return model, slices.slice_linears(model, *names)
    return model, ffn.attach(model, toys.neurons() if kind == "rows" else toys.units())


def optimizer(kind: str, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    made = {"torch": torch.optim.AdamW, "ours": slices.SparseColumnAdamW, "sgd": torch.optim.SGD}
    return made[kind](params, lr=1.0 if kind == "sgd" else 1e-2)


def batch() -> Tensor:
    return torch.arange(48).reshape(4, 12) * 7 % toys.VOCAB


def loss(model: nn.Module) -> Tensor:
    ids = batch()
    return model(input_ids=ids, labels=ids).loss


def steps(model: nn.Module, stepper: torch.optim.Optimizer, backward: Callable = Tensor.backward) -> None:
    for _ in range(STEPS):
        backward(loss(model))
        stepper.step()
        stepper.zero_grad()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=batch()).logits.float()


def loaded(saved: str | Path | dict[str, Tensor]) -> nn.Module:
    """The plain model of a folder or of a state dict; no key but the slices' own may be unknown or missing."""
    if not isinstance(saved, dict):
        model, report = LlamaForCausalLM.from_pretrained(saved, output_loading_info=True, dtype="auto")
        unknown, missing = report["unexpected_keys"], report["missing_keys"]
    else:
        model = toys.model()
        missing, unknown = model.load_state_dict(saved, strict=False)
    assert not missing
    assert all(name.rpartition(".")[2] in OWN for name in unknown), unknown
    return model.eval()


def distance(live: nn.Module, saved: str | Path | dict[str, Tensor]) -> tuple[float, float]:
    """(what the saved model is away from the live one, how far training moved it): largest differences of logits."""
    now = logits(live.eval())
    with torch.no_grad():
        return float((logits(loaded(saved)) - now).abs().max()), float((logits(toys.model()) - now).abs().max())


def two_ranks(how: str, kind: str, opt: str, out: str) -> tuple[float, float, float] | None:
    """Train under a wrapper and save in its way; `how`: wrapper.way.

    First rank: `distance`, and how far the live model is from one that was trained in one process; of the others None.
    """
    wrapper, _, way = how.partition(".")
    model, params = sliced(kind, model=_partitioned() if wrapper == "early3" else None)
    live, saved = (_fsdp2 if wrapper == "fsdp2" else _deepspeed)(model, params, wrapper, way, opt, Path(out))
    now = logits(live)
    if torch.distributed.get_rank():
        return None
    alone, params = sliced(kind)
    steps(alone, optimizer(opt, params))
    away, moved, apart = (float((logits(m) - now).abs().max()) for m in (loaded(saved), toys.model(), alone))
    return away, moved, apart


def _partitioned() -> nn.Module:
    """The toy as transformers loads it where ZeRO-3 is configured already: partitioned before the slices are chosen."""
    import deepspeed

    model = toys.model()
    deepspeed.zero.Init(module=model, config_dict_or_path={"train_batch_size": 8, "zero_optimization": {"stage": 3}})
    return model


def _fsdp2(model: nn.Module, params: list, wrapper: str, way: str, opt: str, out: Path) -> tuple[nn.Module, Any]:
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    steps(model, optimizer(opt, [p for p in model.parameters() if p.requires_grad]))
    if way == "save":
        ffn.save(model, out)
        torch.distributed.barrier()
        return model, out
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    if way == "full":
        return model, dcp.get_model_state_dict(model, options=options)
    sharded = dcp.get_model_state_dict(model)
    torch.distributed.checkpoint.save(sharded, checkpoint_id=out)
    plain = toys.model().state_dict()
    torch.distributed.checkpoint.load(plain, checkpoint_id=out)
    return model, plain


def _deepspeed(model: nn.Module, params: list, wrapper: str, way: str, opt: str, out: Path) -> tuple[nn.Module, Any]:
    import deepspeed
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as from_checkpoint

    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": int(wrapper[-1]),
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_param_persistence_threshold": 40,
        },
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer(opt, params), config=config, dist_init_required=False
    )
    for _ in range(STEPS):
        engine.backward(loss(engine))
        engine.step()
    if way == "save":
        ffn.save(engine, out)
        saved = out
    elif way == "weights":
        engine.save_16bit_model(str(out))
        saved = None
    else:
        engine.save_checkpoint(str(out))
        saved = None
    torch.distributed.barrier()
    if saved is None and not torch.distributed.get_rank():
        file = {"weights": "pytorch_model.bin", "module": f"global_step{STEPS}/mp_rank_00_model_states.pt"}.get(way)
        saved = torch.load(out / file, weights_only=False) if file else from_checkpoint(str(out))
        saved = saved["module"] if way == "module" else saved
    return engine, saved


def plain_into_fsdp2(ranks: str) -> float:
    """How far an attached FSDP2 model is from a plain one whose dict it has loaded, after it was moved once more.

    `ranks`: "all" have the dict, or the "first" sends it.
    """
    model, _ = sliced("rows")
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    plain = toys.model(seed=5)
    has = ranks == "all" or not torch.distributed.get_rank()
    options = dcp.StateDictOptions(full_state_dict=True, strict=False, broadcast_from_rank0=ranks == "first")
    dcp.set_model_state_dict(model, plain.state_dict() if has else {}, options=options)
    model.double().float()
    return float((logits(model) - logits(plain)).abs().max())


def sharded_without_values() -> float:
    """As Accelerate does with `cpu_ram_efficient_loading`: sharded on the meta device, then loaded, buffers last.

    How far it then is from a model that was attached alone.
    """
    model, _ = sliced("columns")
    alone, _ = sliced("columns")
    full = model.state_dict()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to("meta")
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    fully_shard(model, mesh=mesh)
    shapes = model.state_dict()
    assert all(tensor.is_meta for tensor in shapes.values())
    parts = {
        name: distribute_tensor(full[name], tensor.device_mesh, tensor.placements) for name, tensor in shapes.items()
    }
    model.load_state_dict(parts, assign=True)
    for name, buffer in buffers.items():
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent).register_buffer(child, buffer, persistent=False)
    return float((logits(model) - logits(alone)).abs().max())
