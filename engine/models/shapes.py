"""The shape of a model: what counts of neurons and parameters, statistics and the dry run follow from. No weights.

    known("Llama-3.1-8B").parameters          # 8,030,261,248
    from_config(model.config)                 # of any dense decoder, by its modules

A neuron is an output channel of one FFN projection (CANEFT): 2I + H a layer in a gated FFN, I + H in a plain one.
"""

from __future__ import annotations

import contextlib
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..common import private
from ..common.errors import UserError
from ..common.files import first_line
from ..data.tiny.pretrain import SIZES
from . import kinds
from .baichuan import llama_config
from .large.plan import has_plan
from .sites import FFNSite, find_ffns, model_without_weights


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block: its name in the block, weights of a row and rows."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class ModelShape:
    """What is counted of a decoder-only transformer whose blocks are alike."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    """The output head is the embedding."""
    gated: bool
    """gate/up/down; otherwise two projections."""
    activation: str
    """The kernels' name: `silu`, `gelu_tanh`, `gelu` (erf), `relu` or `relu2`."""
    mlp_bias: bool
    linears: tuple[Linear, ...]
    """Linear layers of a block, in its order."""
    ffn: tuple[str, ...]
    """Names in the block of the layers that the FFN's projections lie in; gate and up may lie in one."""
    block_parameters: int
    """Parameters of one transformer block, its norms included."""
    other_parameters: int
    """Those outside of the blocks; tied embeddings count once."""
    norms: int = 2
    """Normalisations of the residual stream's width in a block (Gemma-2 has four)."""
    norm_in_fp32: bool = True
    """Whether they save their input in fp32: transformers' RMSNorm does, torch's LayerNorm does not."""
    softcap: bool = False
    """Attention logits are capped (Gemma-2), which torch's sdpa cannot do."""
    backends: bool = True
    """transformers has more than its own attention for it (BLOOM has not)."""
    takes_positions: bool = True
    """Its forward takes position_ids, so sentences can be packed in one row."""
    tensor_parallel: bool = True
    """transformers has a plan for it to cut its layers over several GPUs (BLOOM has none)."""

    @property
    def packed(self) -> bool:
        """Whether gate and up lie in one layer."""
        return self.gated and self.ffn[0] == self.ffn[1]

    @property
    def widths(self) -> dict[str, int]:
        """Neurons of each projection of one layer, in the order that numbers them."""
        if self.gated:
            return {"gate": self.intermediate, "up": self.intermediate, "down": self.hidden}
        return {"in": self.intermediate, "out": self.hidden}

    @property
    def fan_in(self) -> dict[str, int]:
        """Weights of one neuron (a row of the torch weight) of each projection, its bias entry not counted."""
        if self.gated:
            return {"gate": self.hidden, "up": self.hidden, "down": self.intermediate}
        return {"in": self.hidden, "out": self.intermediate}

    @property
    def slice_weights(self) -> dict[str, int]:
        """Trainable parameters of one neuron of each projection: its row, and its bias entry where there is one."""
        return {name: weights + self.mlp_bias for name, weights in self.fan_in.items()}

    @property
    def neurons_per_layer(self) -> int:
        return sum(self.widths.values())

    @property
    def neurons(self) -> int:
        """Neurons of the whole model."""
        return self.layers * self.neurons_per_layer

    @property
    def ffn_parameters(self) -> int:
        """Weights and biases of one layer's FFN."""
        return sum(width * self.slice_weights[name] for name, width in self.widths.items())

    @property
    def parameters(self) -> int:
        """Parameters of the whole model; tied embeddings count once."""
        return self.other_parameters + self.layers * self.block_parameters


def _llama(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    }


KNOWN: dict[str, dict[str, Any]] = {
    "Llama-2-7B": _llama(32, 4096, 11008, 32, 32, 32_000),
    "Llama-3.1-8B": _llama(32, 4096, 14336, 32, 8, 128_256),
    "Llama-3.3-70B": _llama(80, 8192, 28672, 64, 8, 128_256),
    "Qwen2.5-7B": _llama(28, 3584, 18944, 28, 4, 152_064) | {"model_type": "qwen2"},
    "Qwen2.5-72B": _llama(80, 8192, 29568, 64, 8, 152_064) | {"model_type": "qwen2"},
    "Gemma-2-9B": _llama(42, 3584, 14336, 16, 8, 256_000) | {"model_type": "gemma2", "head_dim": 256},
    "BLOOM-7b1": {"model_type": "bloom", "hidden_size": 4096, "n_layer": 30, "n_head": 32, "vocab_size": 250_880},
    "Baichuan2-7B": _llama(32, 4096, 11008, 32, 32, 125_696),
    "SmolLM2-135M": _llama(30, 576, 1536, 9, 3, 49_152) | {"tie_word_embeddings": True},
}
"""What a config.json says of the models of our recipes, for a dry run without one; Baichuan2 as a Llama."""


def llama(
    name: str, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int, tied: bool = False
) -> ModelShape:
    """The shape of a Llama of these sizes."""
    sizes = _llama(layers, hidden, intermediate, heads, kv_heads, vocab)
    return from_config(sizes | {"tie_word_embeddings": tied}, name)


@functools.cache
def known(name: str) -> ModelShape:
    """The shape of a model of KNOWN."""
    return from_config(KNOWN[name], name)


def resolve(path: str, name: str = "") -> ModelShape:
    """The shape of a model by arithmetic and small files only: no weights, no network.

    `path` is what --model.path takes. A config.json in that folder or in the hub's cache comes first, then the known
    shape called `name`. Raises UserError where there is neither, and for a model that cannot be used.
    """
    if path in ("tiny", "tiny-pairs"):  # of one shape
        return _tiny(path)
    file = Path(path).expanduser() / "config.json"
    if not file.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        with contextlib.suppress(HFValidationError):
            file = Path(try_to_load_from_cache(path, "config.json") or file)
    if file.is_file():
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file}: {error}") from None
        return from_config(settings, path)
    if name in KNOWN:
        return known(name)
    raise UserError(f"--model.path {path}: no config.json here; name its shape: --shape {' | '.join(KNOWN)}")


def from_config(config: Any, name: str = "") -> ModelShape:
    """The shape of a Hugging Face config or a parsed config.json, by the model's modules without their weights.

    Raises UserError for a model that is no dense decoder (kinds.check), or whose FFNs are of no kind that is known.
    """
    settings = config if isinstance(config, dict) else config.to_dict()
    name = name or getattr(config, "name_or_path", "") or settings.get("model_type", "")
    return _from_settings(json.dumps(settings, sort_keys=True, default=str), name)


@functools.lru_cache(maxsize=32)
def _from_settings(text: str, name: str) -> ModelShape:
    settings, where = json.loads(text), name or "config.json"
    if settings.get("model_type") == "baichuan":
        settings = llama_config(settings, where)
    kinds.check(settings, where)
    try:
        model = model_without_weights(settings)
    except Exception as error:  # transformers refuses a config in a dozen ways
        raise UserError(f"{where}: {first_line(error)}: download config.json again") from None
    try:
        return of_model(model, name)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (AttributeError, RuntimeError) as error:  # a config has no number of heads, or one for every layer
        raise UserError(
            f"{where}: {type(model).__name__} is no decoder of blocks that are alike ({first_line(error)}): use a "
            "dense model such as Llama, Qwen, Gemma or Phi"
        ) from None


def of_model(model: nn.Module, name: str = "") -> ModelShape:
    """The shape of a causal LM of transformers, with weights or without."""
    sites, config = find_ffns(model), model.config
    _check_alike(sites)
    last, block = list(sites[0].projections)[-1], model.get_submodule(sites[0].block)
    hidden = sites[0].width(last)
    norms = [m for m in block.modules() if not [*m.children()] and getattr(m, "weight", None) is not None]
    norms = [m for m in norms if m.weight.shape == (hidden,)]
    linears = [(child, m) for child, m in block.named_modules() if isinstance(m, nn.Linear)]
    inside = sum(p.numel() for p in block.parameters())
    heads = config.num_attention_heads
    supports = private.attentions_of(type(model))
    return ModelShape(
        name,
        layers=len(sites),
        hidden=hidden,
        intermediate=sites[0].units(),
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        vocab=model.get_output_embeddings().weight.shape[0],
        tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        gated=sites[0].gated,
        activation=sites[0].activation,
        mlp_bias=any(sites[0].linear(role).bias is not None for role in sites[0].projections),
        linears=tuple(Linear(child, m.in_features, m.out_features) for child, m in linears),
        ffn=tuple(site.removeprefix(f"{sites[0].block}.") for site in map(sites[0].child, sites[0].projections)),
        block_parameters=inside,
        other_parameters=sum(p.numel() for p in model.parameters()) - len(sites) * inside,
        norms=len(norms),
        norm_in_fp32=not any(isinstance(m, nn.LayerNorm) for m in norms),
        softcap=getattr(config, "attn_logit_softcapping", None) is not None,
        backends=any(supports.values()),
        takes_positions=kinds.takes_positions(model),
        tensor_parallel=has_plan(config),
    )


def _check_alike(sites: list[FFNSite]) -> None:
    """Raises UserError where FFNs differ: neurons are numbered alike in every layer."""
    kind = [(s.projections.keys(), s.units(), s.activation) for s in sites]
    other = next((site for site, one in zip(sites, kind, strict=True) if one != kind[0]), None)
    if other:
        raise UserError(
            f"{other.name} has {other.units():,} units of {other.activation}, {sites[0].name} {sites[0].units():,} of "
            f"{sites[0].activation}: models whose FFNs differ from layer to layer are not supported"
        )


def _tiny(name: str) -> ModelShape:
    """The embedded models', before it is built (its tokenizer may turn out a few entries smaller)."""
    size = SIZES["tiny"]
    widths = size.layers, size.hidden, size.intermediate, size.heads, size.heads, size.vocabulary
    return from_config(_llama(*widths) | {"tie_word_embeddings": True}, name)
