"""Folders that people have: what transformers would load as something else is refused in one line, and why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import toys
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, GPTNeoXConfig, LlamaConfig, Phi3Config

from slicetune.engine.common.errors import UserError
from slicetune.engine.export.audit import audit
from slicetune.engine.export.model import export_model
from slicetune.engine.methods.expansion import Expansion
from slicetune.engine.models import kinds, load
from slicetune.engine.models.config import ModelConfig
from slicetune.engine.slices.patches import Patch

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "pad_token_id": 0,
}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    toys.model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def loaded(folder: Path) -> torch.nn.Module:
    return load.load_model(str(folder), ModelConfig(), torch.device("cpu"))


def rewrite(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        loaded(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "language_model."])
def test_a_prefix_that_transformers_does_not_take_off(folder, prefix):
    rewrite(folder, lambda tensors: {prefix + name: t for name, t in tensors.items()})
    assert f"has the prefix '{prefix}': rename the keys" in refusal(folder)


def test_the_body_alone_is_found(folder):
    """Keys without `model.`, as a LlamaModel saves them: transformers finds them."""
    want = toys.model().state_dict()
    rewrite(folder, lambda tensors: {name.removeprefix("model."): t for name, t in tensors.items()})
    assert all(torch.equal(want[name], t) for name, t in loaded(folder).state_dict().items())


def test_a_weight_that_is_not_there_is_named_with_its_file(folder):
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if n != HEAD})
    assert "lm_head.weight: no tensor of that name" in refusal(folder)


def test_what_transformers_reports_missing_is_an_error(folder):
    """Behind all checks of names: a weight that it did not find would be random."""
    from slicetune.engine.models import folders

    model = toys.model()
    with pytest.raises(UserError, match=r"1 weights of LlamaForCausalLM are not in the checkpoint .*\(a\.b\)"):
        folders.check_loaded(folder, model, {"missing_keys": ["a.b"], "mismatched_keys": []})


@pytest.mark.parametrize("whole", [True, False], ids=["beside a model", "alone"])
def test_an_adapter_in_the_folder(folder, tmp_path, whole):
    get_peft_model(toys.model(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    for file in (tmp_path / "adapter").glob("adapter*"):
        shutil.copy(file, folder)
    if not whole:
        (folder / "model.safetensors").unlink()
    assert "adapter_config.json: a PEFT adapter lies in the folder: merge it" in refusal(folder)


@pytest.mark.parametrize("how", ["folder", "path"])
def test_gguf(tmp_path, how):
    file = tmp_path / "model-Q4_K_M.gguf"
    file.write_bytes(b"GGUF")
    (tmp_path / "config.json").write_text("{}")
    words = refusal(tmp_path if how == "folder" else file)
    assert "model-Q4_K_M.gguf: GGUF weights are not read: take the model's safetensors checkpoint" in words


def packed_integers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.to(torch.int8) if n.endswith("up_proj.weight") else t for n, t in tensors.items()}


def with_scales(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """fp8 weights of a program that wrote no quantization_config: they would be trained unscaled."""
    names = [n for n in tensors if n.endswith("up_proj.weight")]
    return tensors | {f"{n}_scale": torch.ones(1) for n in names}


def gptq(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.replace("up_proj.weight", "up_proj.qweight"): t for n, t in tensors.items()}


@pytest.mark.parametrize("change", [packed_integers, with_scales, gptq])
def test_quantised_weights_without_a_word_in_the_config(folder, change):
    rewrite(folder, change)
    assert "so quantised: take the unquantised checkpoint" in refusal(folder)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "fp8"])
def test_a_quantised_model_by_its_config(folder, method):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": method}}))
    assert f"config.json: the weights are quantised ({method}): take the unquantised checkpoint" in refusal(folder)


def test_old_rotary_buffers_are_no_weights(folder):
    want = toys.model().state_dict()
    rewrite(folder, lambda tensors: tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert all(torch.equal(want[name], t) for name, t in loaded(folder).state_dict().items())


@pytest.fixture
def tied(tmp_path) -> Path:
    """A tied model whose file has the head too, as Qwen3-0.6B's."""
    torch.manual_seed(0)
    base = tmp_path / "tied"
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, tie_word_embeddings=True)).save_pretrained(base)
    rewrite(base, lambda tensors: tensors | {HEAD: tensors[EMBEDDING].clone()})
    return base


def test_a_tied_head_that_is_stored_goes_with_the_embedding(tied, tmp_path):
    base = loaded(tied)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    new = load_file(tied / "model.safetensors")[EMBEDDING] + 0.5
    export_model(tied, {EMBEDDING: Patch(None, None, new)}, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, new)


def test_a_tied_head_that_is_stored_with_other_values_is_two_models(tied):
    rewrite(tied, lambda tensors: tensors | {HEAD: tensors[EMBEDDING] + 0.5})
    refused = refusal(tied)
    assert f"config.json says that {EMBEDDING} and {HEAD} are one tensor (tie_word_embeddings)" in refused
    assert f"take {HEAD} out of the checkpoint" in refused
    config = json.loads((tied / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tied / "config.json").write_text(json.dumps(config))
    assert not torch.equal(loaded(tied).lm_head.weight, loaded(tied).model.embed_tokens.weight)


def test_the_audit_sees_a_head_that_was_left_behind(tied, tmp_path):
    shutil.copytree(tied, tmp_path / "out")
    rewrite(tmp_path / "out", lambda tensors: tensors | {EMBEDDING: tensors[EMBEDDING] + 0.5})
    report = audit(tied, tmp_path / "out")
    assert report.apart == [f"{EMBEDDING} and {HEAD}"]
    assert f"TIED, but not equal: {EMBEDDING} and {HEAD}" in str(report)
    assert not report.ok


def test_a_tied_model_that_is_stored_by_its_heads_name(tied):
    rewrite(tied, lambda tensors: {name: t for name, t in tensors.items() if name != EMBEDDING})
    try:
        AutoModelForCausalLM.from_pretrained(tied, output_loading_info=True)
    except RuntimeError:
        pytest.skip("this transformers does not tie it")
    assert torch.equal(loaded(tied).model.embed_tokens.weight, load_file(tied / "model.safetensors")[HEAD])


def test_a_name_that_transformers_changes_while_loading(tmp_path):
    """GPT-NeoX's `embed_out` is the model's `lm_head`; the export keeps the file's name."""
    torch.manual_seed(0)
    base = tmp_path / "neox"
    AutoModelForCausalLM.from_config(GPTNeoXConfig(**SIZES)).save_pretrained(base)
    key = next(n for n in load_file(base / "model.safetensors") if n in (HEAD, "embed_out.weight"))
    model = loaded(base)
    name = next(n for n, p in model.named_parameters() if p is model.get_output_embeddings().weight)
    new = model.get_output_embeddings().weight.detach() + 1
    export_model(base, {name: Patch(None, None, new)}, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[key], new)
    assert torch.equal(loaded(tmp_path / "out").get_output_embeddings().weight, new)


def test_a_deeper_model_lists_its_windows(tmp_path):
    """Gemma-2 without layer_types: which layer has a window follows from its number, which a new block changes."""
    torch.manual_seed(0)
    base = tmp_path / "gemma"
    sizes = SIZES | {"num_hidden_layers": 4, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
    AutoModelForCausalLM.from_config(Gemma2Config(**sizes)).save_pretrained(base)
    settings = json.loads((base / "config.json").read_text())
    settings.pop("layer_types")
    (base / "config.json").write_text(json.dumps(settings))
    deeper = Expansion(after=(0, 2))
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    grown = AutoModelForCausalLM.from_pretrained(base).eval()
    deeper.apply(grown)
    copies = ("model.layers.1.", "model.layers.4.")
    zero = {n: Patch(None, None, p.detach()) for n, p in grown.named_parameters() if n.startswith(copies)}
    export_model(base, zero, tmp_path / "out", expansion=deeper)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    kinds_of = json.loads((tmp_path / "out" / "config.json").read_text())["layer_types"]
    assert kinds_of == [kind for i, kind in enumerate(plain.config.layer_types) for _ in range(2 if i in (0, 2) else 1)]
    ids = torch.arange(20).view(1, 20)
    with torch.no_grad():
        want = plain(ids).logits
        assert torch.allclose(exported(ids).logits, want, atol=1e-5)
        assert torch.allclose(grown(ids).logits, want, atol=1e-5)


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("config", "longest", "words"),
    [
        (LlamaConfig(max_position_embeddings=64), 64, ""),
        (
            LlamaConfig(max_position_embeddings=64),
            65,
            "x has 65 tokens, the model's limit is 64: it was not trained",
        ),
        (
            LlamaConfig(max_position_embeddings=64, rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
            65,
            r"error: x has 65 tokens, the model's limit is 64: beyond it its rotary positions \(dynamic\) change",
        ),
        (LlamaConfig(max_position_embeddings=64, rope_scaling={"rope_type": "dynamic", "factor": 2.0}), 64, ""),
        (
            Phi3Config(**SIZES, max_position_embeddings=128, original_max_position_embeddings=32, rope_scaling=LONG),
            33,
            r"error: x has 33 tokens, the model's limit is 32: beyond it its rotary positions \(longrope\)",
        ),
        (AutoConfig.for_model("gpt2", n_positions=64), 65, "error: x has 65 tokens, .* learned no more positions"),
    ],
)
def test_rows_that_are_longer_than_the_model_knows(config, longest, words):
    import re

    try:
        said = kinds.check_length(config, longest, "x")
    except UserError as error:
        said = f"error: {error}"
    assert re.match(words, said) if words else said == ""
