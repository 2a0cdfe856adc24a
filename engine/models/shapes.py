"""Shapes of models: how many neurons, weights and bytes there are before any weight is read.

    LLAMA31_8B.neurons              # 1,048,576
    LLAMA31_8B.parameters           # 8,030,261,248
    from_config(model.config)       # the same from a Hugging Face config

A neuron is an output channel of one FFN projection (CANEFT): 2I + H a layer in a gated FFN, I + H in BLOOM's.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..data.tiny.pretrain import SIZES
from .baichuan import llama_config

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
}
"""Hugging Face's name of an activation → the kernels' name."""


@dataclass(frozen=True)
class ModelShape:
    """What a decoder-only transformer's parameter count follows from; bias and norm fields say what its family adds."""

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
    gated: bool = True
    """gate/up/down; otherwise BLOOM's two projections."""
    activation: str = "silu"
    """`silu`, `gelu_tanh` or `gelu` (erf)."""
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    norms: int = 2
    """Normalisations a block (Gemma-2 has four)."""
    norm_bias: bool = False
    embedding_norm: bool = False
    """BLOOM normalises the embeddings."""
    softcap: bool = False
    """Attention logits are capped (Gemma-2), which torch's sdpa cannot do."""

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
    def attention_parameters(self) -> int:
        """Weights and biases of one layer's attention."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        weights = self.hidden * (queries + 2 * keys) + queries * self.hidden
        return weights + self.qkv_bias * (queries + 2 * keys) + self.attention_output_bias * self.hidden

    @property
    def block_parameters(self) -> int:
        """Parameters of one transformer block, its norms included."""
        return self.attention_parameters + self.ffn_parameters + self.norms * self._norm

    @property
    def parameters(self) -> int:
        """Parameters of the whole model; tied embeddings count once."""
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2) + self.embedding_norm * self._norm
        return embeddings + self.layers * self.block_parameters + self._norm

    @property
    def _norm(self) -> int:
        return self.hidden * (2 if self.norm_bias else 1)


LLAMA2_7B = ModelShape("Llama-2-7B", 32, 4096, 11008, 32, 32, 128, 32_000, tied=False)
LLAMA31_8B = ModelShape("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128_256, tied=False)
QWEN25_7B = ModelShape("Qwen2.5-7B", 28, 3584, 18944, 28, 4, 128, 152_064, tied=False, qkv_bias=True)
GEMMA2_9B = ModelShape(
    "Gemma-2-9B", 42, 3584, 14336, 16, 8, 256, 256_000, tied=True, activation="gelu_tanh", norms=4, softcap=True
)
BLOOM_7B1 = ModelShape(
    "BLOOM-7b1",
    30,
    4096,
    16384,
    32,
    32,
    128,
    250_880,
    tied=True,
    gated=False,
    activation="gelu_tanh",
    qkv_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
    norm_bias=True,
    embedding_norm=True,
)
BAICHUAN2_7B = ModelShape("Baichuan2-7B", 32, 4096, 11008, 32, 32, 128, 125_696, tied=False)
"""Converted to a Llama (baichuan.py)."""

KNOWN = {shape.name: shape for shape in (LLAMA2_7B, LLAMA31_8B, QWEN25_7B, GEMMA2_9B, BLOOM_7B1, BAICHUAN2_7B)}
"""Shapes by name, for a dry run without the model's config.json."""


def resolve(path: str, name: str = "") -> ModelShape:
    """The shape of a model by arithmetic and small files only: no weights, no network.

    `path` is what --model.path takes. A config.json in that folder or in the hub's cache comes first, then the known
    shape called `name`. Raises UserError where there is neither.
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
            return from_config(json.loads(file.read_text()), path)
        except ValueError as error:
            raise UserError(f"{file}: {error}") from None
    if name in KNOWN:
        return KNOWN[name]
    raise UserError(f"--model.path {path}: no config.json here; name its shape: --shape {' | '.join(KNOWN)}")


def from_config(config: Any, name: str = "") -> ModelShape:
    """The shape of a Hugging Face config or a parsed config.json (llama, mistral, qwen2, gemma2, bloom, Baichuan2-7B).

    Raises UserError where the architecture is another one.
    """
    raw = isinstance(config, dict)
    if raw and config.get("model_type") == "baichuan":
        config = llama_config(config, name or "config.json")
    kind = config.get("model_type") if raw else getattr(config, "model_type", None)
    if kind not in ("llama", "mistral", "qwen2", "gemma2", "bloom"):
        what = name or "config.json"
        raise UserError(f"{what}: architecture {kind!r} is unknown; use llama, mistral, qwen2, gemma2 or bloom")
    if raw:  # config.json leaves out what is the architecture's default
        from transformers import AutoConfig

        config = AutoConfig.for_model(**config)
    name = name or getattr(config, "name_or_path", "") or kind
    if kind == "bloom":
        return _bloom(config, name)
    bias = kind == "qwen2" or bool(getattr(config, "attention_bias", False))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelShape(
        name,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=head_dim,
        vocab=config.vocab_size,
        tied=config.tie_word_embeddings,
        activation=_activation(config.hidden_activation if kind == "gemma2" else config.hidden_act, name),
        qkv_bias=bias,
        attention_output_bias=bias and kind != "qwen2",
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        norms=4 if kind == "gemma2" else 2,
        softcap=getattr(config, "attn_logit_softcapping", None) is not None,
    )


def _tiny(name: str) -> ModelShape:
    """The embedded models', before it is built (its tokenizer may turn out a few entries smaller)."""
    size = SIZES["tiny"]
    head_dim = size.hidden // size.heads
    widths = (size.layers, size.hidden, size.intermediate, size.heads, size.heads, head_dim, size.vocabulary)
    return ModelShape(name, *widths, tied=True)


def _bloom(config: Any, name: str) -> ModelShape:
    """BLOOM: biases everywhere, packed query_key_value, ALiBi (no positions to learn), GELU by the tanh formula."""
    return ModelShape(
        name,
        layers=config.n_layer,
        hidden=config.hidden_size,
        intermediate=4 * config.hidden_size,
        heads=config.n_head,
        kv_heads=config.n_head,
        head_dim=config.hidden_size // config.n_head,
        vocab=config.vocab_size,
        tied=config.tie_word_embeddings,
        gated=False,
        activation="gelu_tanh",
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        norm_bias=True,
        embedding_norm=True,
    )


def _activation(name: str, model: str) -> str:
    if name not in ACTIVATIONS:
        raise UserError(f"{model}: activation {name!r} is unknown; use a model with {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]
