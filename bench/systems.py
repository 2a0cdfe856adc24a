"""The ways to train one model that bench_step.py compares: each makes a System from a frozen base.

Every system computes the same loss of the same batch by engine/scoring/loss.py. The light ones share the base's
weights; full fine-tuning and masked Adam own a copy, since they write to all of it. Optimizers are the fair forms:
torch's fused AdamW wherever there is one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from shapes import DEVICE, DTYPE, NEURON_RATIO, SMOKE, Load
from torch import Tensor, nn

from slicetune.engine.data.batching import Batch, Example, pack, pad
from slicetune.engine.models import attention, sites
from slicetune.engine.models.quantised import load as loading
from slicetune.engine.models.shapes import ModelShape
from slicetune.engine.scoring.loss import target_losses
from slicetune.engine.slices import ffn
from slicetune.engine.slices.neurons import NeuronSet
from slicetune.engine.slices.optim import SparseColumnAdamW
from slicetune.engine.slices.written import leave_to_optimizer
from slicetune.engine.training.compiled import compile_blocks

LR = 1e-5
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass
class System:
    """A model ready to train: `step` is one update on the batch it was made for."""

    model: nn.Module
    batch: Batch
    params: list[nn.Parameter]
    optimizer: Any = None
    before_update: Callable[[], None] = lambda: None
    held: list[Any] = field(default_factory=list)
    """What else stays in memory between steps: masks."""

    def loss(self) -> Tensor:
        return target_losses(self.model, self.batch).mean()

    def gradients(self) -> None:
        self.loss().backward()

    def step(self) -> None:
        self.gradients()
        if self.optimizer is not None:
            self.before_update()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def everything(self) -> list[Any]:
        """All that lives from step to step."""
        return [self.model, self.params, self.optimizer, self.held]


def random_model(shape: ModelShape) -> nn.Module:
    """A Llama of this shape with random weights, made on the device; nothing is read or downloaded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=4096,
        use_cache=False,
    )
    attention.register()
    path = attention.attention_path("auto", DEVICE, LlamaConfig(**sizes).to_dict(), DTYPE)  # as the engine chooses
    config = LlamaConfig(**sizes, attn_implementation=path)
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with DEVICE:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)


def sentences(load: Load, count: int | None = None, groups: int = 4, seed: int = 0) -> list[Example]:
    """Sentences of random tokens, the second half of each to be predicted."""
    draw = torch.Generator().manual_seed(seed)
    lengths = lengths_of(load, count or load.sentences, draw)
    ids = [torch.randint(load.model.vocab, (length,), generator=draw).tolist() for length in lengths]
    return [Example(each, len(each) // 2, i % groups, f"random/train/{i}") for i, each in enumerate(ids)]


def lengths_of(load: Load, count: int, draw: torch.Generator) -> list[int]:
    """All load.length tokens where the form is "equal"; else drawn from half to one and a half of that.

    The second of two is as much longer as the first is shorter, so that their sum is that of equal ones.
    """
    if load.form == "equal":
        return [load.length] * count
    half = load.length // 2
    off = torch.randint(-half, half + 1, (count // 2,), generator=draw).tolist()
    return [load.length + each for pair in off for each in (pair, -pair)] + [load.length] * (count % 2)


def batch_of(load: Load) -> Batch:
    """The engine's own batch: packed as `train` packs, or padded to the longest sentence."""
    examples = sentences(load)
    return (pack(examples) if load.form == "packed" else pad(examples, 0)).to(DEVICE)


def random_neurons(shape: ModelShape, ratio: float = NEURON_RATIO) -> NeuronSet:
    """A random share of all neurons: the trained weights are what a random choice would cost."""
    draw = torch.Generator().manual_seed(1)
    chosen = torch.randperm(shape.neurons, generator=draw)[: max(1, round(ratio * shape.neurons))]
    return NeuronSet.from_flat(chosen, shape)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks of one of our Llamas."""
    return list(model.model.layers)


def compiled(system: System) -> System:
    """The same system with its decoder blocks compiled, as --model.compile blocks does; the model has no dropout.

    All blocks of all systems share one code object, and torch goes back to eager code, without a word, after too many
    compilations of it: what each system adds is allowed here.
    """
    torch._dynamo.config.recompile_limit += compile_blocks(system.model, "eager" if SMOKE else "inductor")
    system.model.train()  # only what trains is compiled
    return system


def sharing(base: nn.Module) -> nn.Module:
    """A second model around the same weights."""
    return copy.deepcopy(base, {id(t): t for t in (*base.parameters(), *base.buffers())})


def fused_adamw(params: list[nn.Parameter], lr: float = LR) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=lr, weight_decay=0.0, fused=True)


def floor(base: nn.Module, batch: Batch, fuse: bool = False) -> System:
    """Forward and the gradient of every activation, all weights frozen: no method that trains all layers does less."""
    model = sharing(base)
    if fuse:
        ffn.fuse(model)
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    return System(model, batch, [])


def slices(base: nn.Module, batch: Batch, neurons: NeuronSet, **options: Any) -> System:
    """Ours: the chosen rows, by ffn.attach and SparseColumnAdamW (fp32 masters and moments)."""
    model = sharing(base)
    params = ffn.attach(model, neurons)
    leave_to_optimizer(model)  # as the engine does
    return System(model, batch, params, SparseColumnAdamW(params, lr=LR, weight_decay=0.0, **options))


@dataclass(frozen=True)
class InMemory:
    """Where a quantised layer's unquantised weight lies: in the base, which has no folder (as quantised.Stored)."""

    weight: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def part(self, axis: int, index: Tensor) -> Tensor:
        found = self.weight.index_select(axis, index)
        return found.t().contiguous() if axis else found


def quantised(base: nn.Module, how: str) -> nn.Module:
    """The base with its blocks' linear layers in `nf4`, `int8` or `fp8`, as --model.quantize has them."""
    model = sharing(base)
    dtype, weights = base.dtype, dict(base.named_parameters())
    for name, layer in loading.replaced(model, how, dtype).items():
        weight = weights[f"{name}.weight"]
        layer.weight = loading.quantised(layer, weight.detach().clone())
        layer.stored = InMemory(weight.detach())
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = how == "nf4", how == "int8"
    return model


def _adapted(base: nn.Module, batch: Batch, config: Any, fp32: bool) -> System:
    from peft import get_peft_model

    model = sharing(base)
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=fp32)
    params = [p for p in wrapped.parameters() if p.requires_grad]
    return System(model, batch, params, fused_adamw(params))


def lora(base: nn.Module, batch: Batch, targets: tuple[str, ...], fp32: bool = True, dora: bool = False) -> System:
    """PEFT's LoRA or DoRA of rank 8; `fp32` is PEFT's default of keeping a half-precision model's adapters in fp32."""
    from peft import LoraConfig

    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=list(targets), use_dora=dora)
    return _adapted(base, batch, config, fp32)


def shira(base: nn.Module, batch: Batch, shape: ModelShape) -> System:
    """PEFT's SHiRA on the FFN: scattered single weights, about as many as one per cent of it."""
    from peft import ShiraConfig

    rank = max(1, round(NEURON_RATIO * shape.hidden * shape.intermediate / (shape.hidden + shape.intermediate)))
    return _adapted(base, batch, ShiraConfig(r=rank, target_modules=list(MLP), random_seed=0), True)


def full(base: nn.Module, batch: Batch) -> System:
    """All parameters, fused AdamW; on a GPU moments have the weights' bfloat16 (the cheaper form)."""
    model = copy.deepcopy(base).requires_grad_(True)
    params = list(model.parameters())
    return System(model, batch, params, fused_adamw(params))


def masked(base: nn.Module, batch: Batch, neurons: NeuronSet, fused: bool) -> System:
    """The way of CANEFT's authors: full gradients of the FFNs, multiplied by a 0/1 mask, Adam over all FFN weights.

    `fused` gives it torch's fused Adam, otherwise it has the one that torch takes by itself.
    """
    model = copy.deepcopy(base).requires_grad_(False)
    params, masks = [], []
    for site in sites.find_ffns(model):
        for role, child in site.projections.items():
            weight = getattr(site.module, child).weight.requires_grad_(True)
            mask = torch.zeros_like(weight)
            mask[neurons.slices.get((site.layer, role, "row"), torch.empty(0, dtype=torch.int64)).to(mask.device)] = 1
            params.append(weight)
            masks.append(mask)

    def silence() -> None:
        for weight, mask in zip(params, masks, strict=True):
            weight.grad *= mask

    optimizer = torch.optim.Adam(params, lr=LR, fused=fused or None)
    return System(model, batch, params, optimizer, silence, masks)
