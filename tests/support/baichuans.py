"""Small random checkpoints laid out as Baichuan2-7B's: tensors, config, a sentencepiece file, code of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file

LAYERS, HIDDEN, HEADS, INNER, VOCAB = 2, 32, 4, 48, 420
CONFIG = {
    "_from_model_config": True,
    "architectures": ["BaichuanForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_baichuan.BaichuanConfig",
        "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": INNER,
    "max_position_embeddings": 128,
    "model_max_length": 128,
    "model_type": "baichuan",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "tokenizer_class": "BaichuanTokenizer",
    "torch_dtype": "float32",
    "transformers_version": "4.29.2",
    "use_cache": True,
    "vocab_size": VOCAB,
    "z_loss_weight": 0,
}
TOKENIZER = {
    "add_bos_token": False,
    "add_eos_token": False,
    "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]},
    "bos_token": {"__type": "AddedToken", "content": "<s>"},
    "eos_token": {"__type": "AddedToken", "content": "</s>"},
    "pad_token": {"__type": "AddedToken", "content": "<unk>"},
    "tokenizer_class": "BaichuanTokenizer",
    "unk_token": {"__type": "AddedToken", "content": "<unk>"},
}
EVIL = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
PLAIN = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
"""What the report says of its tokenizer: no normalisation, no space forced before the text."""


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """A random checkpoint under the names of the published one; head rows of many lengths, norms that are not one."""
    torch.manual_seed(seed)
    draw = lambda *shape: 0.3 * torch.randn(*shape)  # noqa: E731
    found = {"model.embed_tokens.weight": draw(VOCAB, HIDDEN), "model.norm.weight": 1 + draw(HIDDEN)}
    found["lm_head.weight"] = draw(VOCAB, HIDDEN) * torch.linspace(0.1, 9, VOCAB)[:, None]
    for i in range(LAYERS):
        block = f"model.layers.{i}."
        found |= {
            block + f"{name}.weight": 1 + draw(HIDDEN) for name in ("input_layernorm", "post_attention_layernorm")
        }
        found[block + "self_attn.W_pack.weight"] = draw(3 * HIDDEN, HIDDEN)
        found[block + "self_attn.o_proj.weight"] = draw(HIDDEN, HIDDEN)
        found[block + "self_attn.rotary_emb.inv_freq"] = draw(HIDDEN // HEADS // 2)
        found |= {block + f"mlp.{name}_proj.weight": draw(INNER, HIDDEN) for name in ("gate", "up")}
        found[block + "mlp.down_proj.weight"] = draw(HIDDEN, INNER)
    return found


def train_pieces(folder: Path, lines: Sequence[str], **settings) -> Path:
    """A sentencepiece file of VOCAB pieces for `lines`."""
    (folder / "text").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "m"),
        vocab_size=VOCAB,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        minloglevel=2,
        **settings,
    )
    return folder / "m.model"


def lay_out(folder: Path, pieces: Path) -> Path:
    """The checkpoint of a stranger, with that tokenizer: two shards, an index, code of its own."""
    folder.mkdir()
    write(folder / "config.json", CONFIG)
    write(folder / "tokenizer_config.json", TOKENIZER)
    (folder / "tokenizer.model").write_bytes(pieces.read_bytes())
    for name in ("modeling_baichuan.py", "configuration_baichuan.py", "tokenization_baichuan.py"):
        (folder / name).write_text(EVIL)
    split, names = weights(), ("a.safetensors", "b.safetensors")
    where = {name: names[i % 2] for i, name in enumerate(split)}
    for shard in names:
        save_file({n: t for n, t in split.items() if where[n] == shard}, folder / shard)
    write(folder / "model.safetensors.index.json", {"weight_map": where})
    return folder


def write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value))
