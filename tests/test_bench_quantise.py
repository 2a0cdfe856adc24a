"""bench/quantise.py: what it counts as weights is what its arithmetic says, and its page tells noise from a cost."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from slicetune.engine.methods.caneft import Caneft
from slicetune.engine.models.config import ModelConfig
from slicetune.engine.models.load import load_model
from slicetune.engine.models.shapes import from_config
from slicetune.engine.run.config import RunConfig

SIZE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 64}
SIZE |= {"num_attention_heads": 4, "num_key_value_heads": 2}


pytestmark = pytest.mark.usefixtures("bench")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZE)).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["none", "nf4", "int8", "fp8"])
def test_weights_as_held_are_those_of_the_arithmetic(folder, kind):
    import quantise

    config = ModelConfig(path=str(folder), dtype="bfloat16", quantize=kind)
    model = load_model(str(folder), config, torch.device("cpu"))
    parts, shape = quantise.held(model), from_config(model.config)
    linears = 2 * (128 * (2 * 128 + 2 * 64) + 3 * 128 * 256)  # q, o; k, v; gate, up, down
    assert parts["quantised"] == {"none": 0, "nf4": linears // 2}.get(kind, linears)
    wanted = quantise.expected(RunConfig(model=config, method=Caneft()), shape)
    tables = {"none": 0, "nf4": 14 * (16 * 4 + 256 * 4 + 4)}.get(kind, 0)  # values of the codes, and an offset, a layer
    rotary = sum(buffer.nbytes for name, buffer in model.named_buffers() if "inv_freq" in name)
    assert (
        wanted <= sum(parts.values()) <= wanted + tables + rotary + 14 * 4
    )  # the last scale of a layer is a whole one


def found(seeds: list[int], losses: dict[str, list[float]]) -> dict:
    """What is stored of a model whose exports' dev losses by kind are these, seed by seed."""

    def one(kind: str, at: int) -> dict:
        loss = {"parameters": 10, "trained": losses[kind][at], "export": losses[kind][at]}
        names = ["own"] + ["base's"] * (kind != "none") + ["lora"] * (kind in ("none", "nf4"))
        return dict.fromkeys(names, loss)

    alike = {"overlap": 0.5, "importance": 0.9, "consensus": 0.8}
    kinds = {
        kind: {
            "weights": {"quantised": 1_000_000, "scales": 100_000, "others": 200_000},
            "expected": 1_300_000,
            "counted": {"score": 1, "train": 1},
            "peaks": dict.fromkeys(("load", "score", "train"), 5_000_000),
            "base": 2.0,
            "runs": {str(seed): one(kind, at) for at, seed in enumerate(seeds)},
        }
        for kind in losses
    }
    versions = {"torch": "2", "transformers": "5", "bitsandbytes": "0.5"}
    about = {"cpu": "a CPU", "cores": 2, "versions": versions, "commit": "c", "date": "today"}
    return {
        "model": "small",
        "note": "",
        "parameters": 1000,
        "neurons": 100,
        "rank": 2,
        "dtype": "float32",
        "seen": ["it", "law"],
        "sentences": {"score": 4, "train": 4, "dev": 2},
        "max_length": 96,
        "updates": 2,
        "batch": 2,
        "rate": 0.001,
        "seeds": seeds,
        "provenance": about,
        "kinds": kinds,
        "alike": {kind: {str(seed): alike for seed in seeds} for kind in losses if kind != "none"}
        | {"draws": {"0 1": alike} if len(seeds) > 1 else {}},
    }


def test_the_page_has_differences_by_seed_and_says_what_is_noise():
    import quantise_page

    losses = {"none": [1.5, 1.6], "nf4": [1.51, 1.62], "int8": [1.49, 1.61], "fp8": [1.5, 1.6]}
    page = quantise_page.page({"small": found([0, 1], losses)})
    (own,) = (line for line in page.splitlines() if "its own set" in line)
    assert own.endswith("| 1.5500 | 1.5650 (+0.0100 to +0.0200) | 1.5500 (-0.0100 to +0.0100) | 1.5500 (+0.0000) |")
    assert "Training on it, of the same neurons, changes that loss by +0.0100 to +0.0200 (nf4)" in page
    assert "move the unquantised export by 0.1000; the largest of these differences is 0.0200. 1 of the 6" in page
    assert "| 1.3 | 1.3 | 1.3 | 1.3 |" in page


def test_the_page_of_one_draw_claims_nothing():
    import quantise_page

    losses = {"none": [1.5], "nf4": [1.51], "int8": [1.49], "fp8": [1.5]}
    page = quantise_page.page({"small": found([0], losses)})
    assert "one draw: nothing says how far such differences are chance" in page
