"""Whether rows can be packed is seen on the loaded model, in half precision as well as in float32."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from slicetune.engine.models.packing import find_out, takes_position_ids

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}
MIXING = {
    "Lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "RecurrentGemma": {"lru_width": 32, "block_types": ["recurrent", "attention"]},
}


def model(kind: str, dtype: torch.dtype, **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | more)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["Llama", "Phi3", "GPTNeoX", "Cohere2"])
def test_attention_keeps_samples_apart(kind, dtype):
    plain = model(kind, dtype)
    find_out(plain)
    assert takes_position_ids(plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MIXING)
def test_a_layer_that_carries_over_is_seen_however_little_it_does(kind, dtype, capsys):
    mixing = model(kind, dtype, **MIXING[kind])
    for name, p in mixing.named_parameters():
        if name.endswith(("conv.out_proj.weight", "temporal_block.linear_out.weight")):
            p.mul_(0.1)  # as small as half precision's own rounding
    find_out(mixing)
    assert not takes_position_ids(mixing)
    assert "mixes sentences that lie in one row: batches are padded instead" in capsys.readouterr().out
