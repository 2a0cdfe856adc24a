"""Parameter and neuron counts against transformers' own models, built without memory on the meta device."""

import json

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from slicetune.engine.common.errors import UserError
from slicetune.engine.models import shapes
from slicetune.engine.models.logits import logit_rule
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
LARGE = {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
LLAMA33 = LLAMA31 | LARGE | {"intermediate_size": 28672}
QWEN72 = QWEN25 | LARGE | {"intermediate_size": 29568}
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
        (shapes.known("Llama-2-7B"), LLAMA, 6_738_415_616, 835_584),
        (shapes.known("Llama-3.1-8B"), LLAMA31, 8_030_261_248, 1_048_576),
        (shapes.known("Qwen2.5-7B"), QWEN25, 7_615_616_512, 1_161_216),
        (shapes.known("Llama-3.3-70B"), LLAMA33, 70_553_706_496, 5_242_880),  # 80 × (2 × 28,672 + 8,192) rows
        (shapes.known("Qwen2.5-72B"), QWEN72, 72_706_203_648, 5_386_240),
        (shapes.known("Gemma-2-9B"), GEMMA2, 9_241_705_984, 1_354_752),
        (shapes.known("BLOOM-7b1"), BLOOM, 7_069_016_064, 614_400),  # 30 × (16,384 + 4,096) rows
        (shapes.known("Baichuan2-7B"), LLAMA | {"vocab_size": 125_696}, 7_505_973_248, 835_584),
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
    assert shapes.resolve("no-such/model", "Llama-3.1-8B") is shapes.known("Llama-3.1-8B")
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


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_type": "gpt2"}, "GPT2LMHeadModel has no FFN"),
        ({"model_type": "opt"}, "OPTDecoderLayer has self_attn.k_proj.weight beside its linear layers"),
        (SMALL | {"hidden_act": "quick_gelu"}, "another activation"),
        ({"model_type": "mixtral"}, "mixture of experts"),
        ({"model_type": "qwen3_moe"}, "mixture of experts"),
        ({"model_type": "gemma3"}, r"gemma3 has more parts than a text decoder \(text_config, vision_config\)"),
        ({"model_type": "bart"}, "bart is an encoder-decoder"),
        ({"model_type": "t5"}, "t5 is an encoder-decoder"),
        ({"model_type": "xlstm"}, r"no decoder of blocks that are alike \(AttributeError: .*num_attention_heads"),
        ({"model_type": "vit"}, "vit is no decoder that writes text"),
        ({"model_type": "no-such"}, "knows no model_type 'no-such'"),
        ({}, "knows no model_type None"),
        (SMALL | {"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised \(gptq\)"),
        (SMALL | {"hidden_act": 3}, "config.json again"),
    ],
)
def test_what_is_no_dense_decoder_is_one_line_that_says_what_it_is(settings, words):
    with pytest.raises(UserError, match=words) as caught:
        shapes.from_config(settings, "models/x")
    assert str(caught.value).startswith("models/x: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "more", "scale", "cap"),
    [
        ("Llama", {}, 1.0, None),
        ("Gemma2", {"head_dim": 16}, 1.0, 30.0),
        ("Cohere", {}, 0.0625, None),
        ("Granite", {"logits_scaling": 12.0}, 1 / 12, None),
        ("MiniCPM3", {"dim_model_base": 16}, 0.25, None),
    ],
)
def test_what_is_done_to_logits_is_read_off_the_class(kind, more, scale, cap):
    sizes = {k: v for k, v in SMALL.items() if k != "model_type"} | {"head_dim": 16}
    config = getattr(transformers, f"{kind}Config")(**sizes | more)
    with torch.device("meta"):
        assert logit_rule(AutoModelForCausalLM.from_config(config)) == (pytest.approx(scale), cap)


def test_a_head_that_does_more_is_refused():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("modernbert-decoder"))
    with pytest.raises(UserError, match="ModernBertDecoderForCausalLM: its logits are more than a product"):
        logit_rule(model)
