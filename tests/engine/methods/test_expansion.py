"""LLaMA Pro: the deeper model equals the base exactly before training, for every architecture, live and on disk."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from slicetune.engine.common.errors import UserError
from slicetune.engine.export.model import export_model
from slicetune.engine.methods.expansion import Expansion
from slicetune.engine.methods.llama_pro import LlamaPro
from slicetune.engine.models.shapes import from_config

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 64}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
KINDS = {
    "llama": SMALL,
    "qwen2": SMALL | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "gemma2": SMALL | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "bloom": {"hidden_size": 32, "n_layer": 4, "n_head": 4, "vocab_size": 64, "initializer_range": 0.2},
}


def model(kind: str):
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **KINDS[kind]), attn_implementation="eager")
    for name, p in made.named_parameters():
        if p.dim() == 1:  # norms and biases that are not all alike
            torch.nn.init.normal_(p, mean=0.0 if "bias" in name else 1.0, std=0.1)
    return made.eval()


def logits(made) -> torch.Tensor:
    with torch.no_grad():
        return made(torch.arange(3, 15)[None], use_cache=False).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_deeper_model_equals_the_base(kind, dtype, tmp_path):
    base, deeper, method = model(kind).to(dtype), model(kind).to(dtype), LlamaPro()
    method.prepare(deeper, None)
    assert torch.equal(logits(deeper), logits(base))
    assert deeper.config.num_hidden_layers == 6
    trained = {name: p for name, p in deeper.named_parameters() if p.requires_grad}
    assert {int(name.split(".")[2]) for name in trained} == {2, 5}  # behind the base's blocks 1 and 3
    assert sum(p.numel() for p in trained.values()) == method.bounds(from_config(base.config)).exact

    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    tensors = {f"master/{name}": p.detach() for name, p in trained.items()}
    patches = method.patches(tmp_path / "base", None, tensors)
    export_model(tmp_path / "base", patches, tmp_path / "deeper", expansion=method.expansion(4))
    how = {"attn_implementation": "eager", "dtype": dtype}
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "deeper", **how, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **how)
    assert torch.equal(logits(loaded.eval()), logits(stored.eval()))
    assert getattr(loaded.config, "layer_types", None) == getattr(deeper.config, "layer_types", None)
    for (name, p), (other, q) in zip(deeper.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(p, q), name


def test_new_blocks_get_a_gradient_at_once():
    made = model("llama")
    LlamaPro().prepare(made, None)
    made(torch.arange(3, 15)[None], labels=torch.arange(3, 15)[None]).loss.backward()
    for name, p in made.named_parameters():
        silent = p.requires_grad and ("o_proj" in name or "down_proj" in name)
        assert (p.grad is not None and bool(p.grad.any())) == silent, name  # behind a zero projection nothing moves yet


@pytest.mark.parametrize(
    ("blocks", "layers", "after"), [(2, 32, (15, 31)), (2, 28, (13, 27)), (1, 32, (31,)), (4, 8, (1, 3, 5, 7))]
)
def test_where_blocks_go(blocks, layers, after):
    assert LlamaPro(blocks=blocks).expansion(layers) == Expansion(after)


def test_more_blocks_than_layers_are_refused():
    with pytest.raises(UserError, match="between 1 and the model's 4 layers"):
        LlamaPro(blocks=5).expansion(4)
