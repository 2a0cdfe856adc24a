"""Bytes of a quantised model in the dry run, against bitsandbytes' own modules and counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from slicetune.engine.data.config import DataConfig
from slicetune.engine.evaluation.config import EvaluateConfig
from slicetune.engine.methods.lora import Lora
from slicetune.engine.models.config import ModelConfig
from slicetune.engine.models.shapes import from_config, known
from slicetune.engine.run.config import RunConfig
from slicetune.engine.run.forecast import memory
from slicetune.engine.run.forecast.decoding import decoding
from slicetune.engine.run.forecast.weights import held

LLAMA8 = known("Llama-3.1-8B")
LINEARS = 32 * 4096 * (4096 + 1024 + 1024 + 4096 + 3 * 14336)  # q, k, v, o, gate, up, down of 32 layers
ROWS = 32 * (4096 + 1024 + 1024 + 4096 + 2 * 14336 + 4096)
OTHERS = 2 * 128_256 * 4096 + 65 * 4096  # embeddings, head, norms
BY_HAND = {
    "nf4": LINEARS // 2 + LINEARS // 64 + 4 * LINEARS // (64 * 256) + 2 * OTHERS,
    "int8": LINEARS + 4 * ROWS + 2 * OTHERS,
    "fp8": LINEARS + 4 * ROWS + 2 * OTHERS,
}
LARGEST = 4096 * 14336


def config(kind: str = "none", **fields) -> RunConfig:
    return RunConfig(**{"data": DataConfig(dir="no-such-corpus"), "model": ModelConfig(quantize=kind)} | fields)


def parts(rows: list[memory.Part]) -> dict[str, int]:
    return {row.name: row.bytes for row in rows}


@pytest.mark.parametrize("kind", BY_HAND)
def test_weights_of_an_8b(kind):
    assert LLAMA8.parameters == LINEARS + OTHERS
    (part,) = held(config(kind), LLAMA8)
    assert part.bytes == BY_HAND[kind]
    product = part.formula.replace(",", "").replace("rows × 4", "* 4").replace("others", "").replace("×", "*")
    assert eval(product.replace("B", "")) == pytest.approx(part.bytes, abs=1)  # the product that is shown is the number


@pytest.mark.parametrize(
    "load",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_8bit": True},
    ],
    ids=["nf4", "int8"],
)
def test_weights_are_those_of_bitsandbytes(load, tmp_path):
    """A model of two layers, read as QLoRA reads one; its tables of 16 and 256 entries a layer are not counted."""
    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2, "vocab_size": 96}
    about = AutoConfig.for_model("llama", **sizes, num_attention_heads=4, num_key_value_heads=2)
    AutoModelForCausalLM.from_config(about).to(torch.bfloat16).save_pretrained(tmp_path)
    quantised = BitsAndBytesConfig(**load, llm_int8_skip_modules=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantised, dtype=torch.bfloat16, device_map="cpu"
    )
    kind = "nf4" if "load_in_4bit" in load else "int8"
    measured = sum(size_of(p) for p in model.parameters())
    (part,) = held(config(kind), from_config(about))
    assert part.bytes == pytest.approx(measured, rel=1e-3)


def size_of(parameter: nn.Parameter) -> int:
    """A parameter's bytes with the scales that bitsandbytes keeps beside it."""
    size, state, rows = parameter.nbytes, getattr(parameter, "quant_state", None), getattr(parameter, "SCB", None)
    if state is not None:
        size += state.absmax.nbytes + state.state2.absmax.nbytes
    return size + (rows.nbytes if rows is not None else 0)


def test_what_lies_beside_the_quantised_base():
    """Slices or adapters in the model's dtype, and one layer's weight, dequantised."""
    p = 56_372_736
    got = parts(memory.training(config("nf4"), LLAMA8, 1, p, 480))
    assert got["weights and slices, nf4"] == BY_HAND["nf4"] + 2 * p
    assert got["a dequantised weight"] == 2 * LARGEST
    assert parts(memory.training(config("int8"), LLAMA8, 1, p, 480))["a dequantised weight"] == 8 * LARGEST
    same = parts(memory.training(config(), LLAMA8, 1, p, 480))
    assert {name: got[name] for name in same if name != "weights and slices"} == {
        name: size for name, size in same.items() if name != "weights and slices"
    }
    lora = config("nf4", method=Lora())
    counts = lora.method.bounds(LLAMA8)
    assert parts(memory.trained(lora, LLAMA8, 1, counts))["weights, nf4"] == BY_HAND["nf4"] + 2 * counts.exact
    assert parts(memory.scoring(config("int8"), LLAMA8))["weights, int8"] == BY_HAND["int8"]


def test_fp8_copies():
    got = parts(memory.training(config("fp8"), LLAMA8, 1, 1, 480))
    assert got["fp8 copies"] == 480 * (9 * 14336 + 4) + LARGEST
    decoded = parts(decoding(config("fp8"), LLAMA8, 1))
    assert decoded["fp8 copies"] % (5 * 14336 + 4) == 0  # forward alone
    assert "a dequantised weight" not in got


def test_decoding_on_either_base():
    expected = round(config().method.bounds(LLAMA8).expectation)
    got = parts(decoding(config("nf4"), LLAMA8, 1))
    assert got["weights, nf4"] == BY_HAND["nf4"] + 2 * expected
    full = decoding(config("nf4", evaluate=EvaluateConfig(on="full")), LLAMA8, 1)
    assert full == decoding(config(), LLAMA8, 1)


def test_recomputed_ffns_are_counted():
    """An FFN keeps its input alone; gate and up of one block are there again while its backward runs."""
    again = config(model=ModelConfig(recompute_ffn=True))
    got, usual = (parts(memory.training(run, LLAMA8, 1, 1, 480)) for run in (again, config()))
    assert usual["activations, no checkpointing"] - got["activations, no checkpointing"] == 480 * 32 * 2 * 14336 * 2
    assert got["one FFN's backward"] - usual["one FFN's backward"] == 480 * 2 * 14336 * 2
    scored, as_ever = (memory.scoring(run, LLAMA8) for run in (again, config()))
    assert scored == as_ever
