"""Parameter and neuron counts against transformers' own models, built without memory on the meta device."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from slicetune.engine.common.errors import UserError
from slicetune.engine.models import shapes
from slicetune.engine.models.sites import find_ffns

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32_000,
}
LLAMA31 = LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128_256}
QWEN25 = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152_064,
    "tie_word_embeddings": False,
}
GEMMA2 = {
    "model_type": "gemma2",
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "vocab_size": 256_000,
}
BLOOM = {"model_type": "bloom", "hidden_size": 4096, "n_layer": 30, "n_head": 32, "vocab_size": 250_880}
SMALL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
SMALL_CONFIGS = {
    "tied llama": SMALL | {"tie_word_embeddings": True},
    "llama with biases": SMALL | {"attention_bias": True, "mlp_bias": True},
    "llama with a head_dim of its own": SMALL | {"head_dim": 32},
    "mistral": SMALL | {"model_type": "mistral"},
    "tied qwen2": SMALL | {"model_type": "qwen2", "tie_word_embeddings": True},
    "gemma2": SMALL | {"model_type": "gemma2", "head_dim": 32},
    "bloom": {"model_type": "bloom", "hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": 50},
}


def meta_model(config: dict) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="eager")


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())  # named once where tied


def ffn_rows(model: torch.nn.Module) -> int:
    """Output channels of all FFN projections, counted on the modules."""
    sites = find_ffns(model)
    return sum(getattr(site.module, child).out_features for site in sites for child in site.projections.values())


@pytest.mark.parametrize(
    ("shape", "config", "expected", "neurons"),
    [
        (shapes.LLAMA2_7B, LLAMA, 6_738_415_616, 835_584),
        (shapes.LLAMA31_8B, LLAMA31, 8_030_261_248, 1_048_576),
        (shapes.QWEN25_7B, QWEN25, 7_615_616_512, 1_161_216),
        (shapes.GEMMA2_9B, GEMMA2, 9_241_705_984, 1_354_752),
        (shapes.BLOOM_7B1, BLOOM, 7_069_016_064, 614_400),  # 30 × (16,384 + 4,096) rows
        (shapes.BAICHUAN2_7B, LLAMA | {"vocab_size": 125_696}, 7_505_973_248, 835_584),
    ],
    ids=lambda value: getattr(value, "name", None) or "",
)
def test_known_models(shape, config, expected, neurons):
    model = meta_model(config)
    assert shape.parameters == parameters(model) == expected
    assert shape.neurons == ffn_rows(model) == neurons
    assert shapes.from_config(model.config, shape.name) == shape


@pytest.mark.parametrize("config", SMALL_CONFIGS.values(), ids=SMALL_CONFIGS.keys())
def test_from_config(config):
    model = meta_model(config)
    shape = shapes.from_config(model.config)
    assert shape.parameters == parameters(model)
    assert shape.neurons == ffn_rows(model)
    first = find_ffns(model)[0]
    for projection, child in first.projections.items():
        linear = getattr(first.module, child)
        assert shape.widths[projection] == linear.out_features
        assert shape.fan_in[projection] == linear.in_features
        assert shape.slice_weights[projection] * linear.out_features == sum(p.numel() for p in linear.parameters())
    assert shape.activation == first.activation
    assert list(shape.widths) == list(first.projections)


@pytest.mark.parametrize("config", SMALL_CONFIGS.values(), ids=SMALL_CONFIGS.keys())
def test_config_json_may_leave_defaults_out(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert shapes.resolve(str(tmp_path)).parameters == parameters(meta_model(config))
    assert shapes.from_config(config) == shapes.from_config(AutoConfig.for_model(**config))


def test_resolve_takes_the_folder_before_the_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    assert shapes.resolve(str(tmp_path), "Llama-3.1-8B").layers == 3
    assert shapes.resolve("no-such/model", "Llama-3.1-8B") is shapes.LLAMA31_8B
    with pytest.raises(UserError, match="no-such/model"):
        shapes.resolve("no-such/model")


def test_tiny_is_the_model_that_is_pretrained():
    from slicetune.engine.data.tiny import pretrain

    class Tokenizer:
        bos_token_id = eos_token_id = pad_token_id = 0

        def __len__(self):
            return pretrain.SIZES["tiny"].vocabulary

    with torch.device("meta"):
        model = pretrain.new_model(pretrain.SIZES["tiny"], Tokenizer())
    assert shapes.resolve("tiny").parameters == parameters(model)
    assert shapes.resolve("tiny").neurons == ffn_rows(model)


def test_unknown_architecture_and_activation_are_named():
    with pytest.raises(UserError, match="gpt2"):
        shapes.from_config({"model_type": "gpt2"})
    with pytest.raises(UserError, match="relu"):
        shapes.from_config(SMALL | {"hidden_act": "relu"})
