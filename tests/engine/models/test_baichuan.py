"""Baichuan2-7B as a Llama: against a forward written from its description, and its tokenizer against sentencepiece."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import sentencepiece
import torch
from baichuans import (
    CONFIG,
    HEADS,
    HIDDEN,
    INNER,
    LAYERS,
    PLAIN,
    VOCAB,
    lay_out,
    train_pieces,
    weights,
    write,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from slicetune.engine import commands
from slicetune.engine.common.errors import UserError
from slicetune.engine.export.audit import audit
from slicetune.engine.export.model import export_model
from slicetune.engine.models import load as models
from slicetune.engine.models import shapes
from slicetune.engine.models.baichuan import pieces
from slicetune.engine.models.config import ModelConfig
from slicetune.engine.slices.ffn import attach
from slicetune.engine.slices.neurons import NeuronSet
from slicetune.engine.slices.patches import Patch

TEXT = "the a of Verfahren Anlage Straße law patient return def x 123 45 模型 百川 智能 数据 код слово"
WORDS = TEXT.split()


def forward(w: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """Logits [T, V] in float64, from the description alone, token by token and head by head."""
    w = {name: tensor.double() for name, tensor in w.items()}
    size, half = HIDDEN // HEADS, HIDDEN // HEADS // 2

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[name]

    def rotate(x, position):  # pairs (j, j + half) turn by position · 10000^(-2j/size)
        turned = x.clone()
        for j in range(half):
            angle = position * 10000.0 ** (-2 * j / size)
            turned[j] = x[j] * math.cos(angle) - x[j + half] * math.sin(angle)
            turned[j + half] = x[j + half] * math.cos(angle) + x[j] * math.sin(angle)
        return turned

    x = w["model.embed_tokens.weight"][ids]
    for i in range(LAYERS):
        block = f"model.layers.{i}."
        packed = norm(x, block + "input_layernorm.weight") @ w[block + "self_attn.W_pack.weight"].T
        q, k, v = (packed[:, part * HIDDEN : (part + 1) * HIDDEN].view(len(ids), HEADS, size) for part in range(3))
        mixed = torch.zeros(len(ids), HEADS, size, dtype=torch.float64)
        for head in range(HEADS):
            keys = torch.stack([rotate(k[t, head], t) for t in range(len(ids))])
            for t in range(len(ids)):
                scores = keys[: t + 1] @ rotate(q[t, head], t) / math.sqrt(size)
                mixed[t, head] = scores.softmax(0) @ v[: t + 1, head]
        x = x + mixed.reshape(len(ids), HIDDEN) @ w[block + "self_attn.o_proj.weight"].T
        y = norm(x, block + "post_attention_layernorm.weight")
        gate, up = (y @ w[block + f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ w[block + "mlp.down_proj.weight"].T
    head = w["lm_head.weight"]
    return norm(x, "model.norm.weight") @ (head / head.square().sum(1, keepdim=True).sqrt()).T


@pytest.fixture(scope="module")
def spm(tmp_path_factory) -> Path:
    """A sentencepiece file with the settings of the report, reserved symbols and a piece of spaces."""
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=12)) + "  two" for _ in range(600)]
    symbols = ["▁▁▁▁", "<reserved_106>"]
    return train_pieces(tmp_path_factory.mktemp("spm"), lines, user_defined_symbols=symbols, **PLAIN)


@pytest.fixture
def folder(tmp_path, spm, monkeypatch) -> Path:
    monkeypatch.setenv("SLICETUNE_CACHE", str(tmp_path / "cache"))
    return lay_out(tmp_path / "Baichuan2", spm)


def test_logits_are_those_of_the_description(folder):
    model = models.load_model(str(folder), ModelConfig(dtype="float32"), torch.device("cpu"))
    assert type(model) is LlamaForCausalLM
    ids = [1, 17, 300, 5, 5, 419, 80, 2, 33, 250, 7]
    expected = forward(weights(), ids)
    with torch.no_grad():
        got = model.double()(torch.tensor([ids])).logits[0]
    # transformers computes the angles in float32, and the head's rows are stored rounded to it
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert not (folder / "ran").exists()
    lengths = model.lm_head.weight.norm(dim=1)
    assert torch.allclose(lengths, torch.ones_like(lengths), atol=1e-6)
    raw = weights() | {"lm_head.weight": torch.ones(VOCAB, HIDDEN)}
    assert not torch.allclose(got, forward(raw, ids), atol=0.1)  # the head matters


def test_tokens_are_sentencepieces(folder, spm):
    tokenizer, theirs = models.load_tokenizer(str(folder)), sentencepiece.SentencePieceProcessor(model_file=str(spm))
    assert tokenizer.is_fast
    assert len(tokenizer) == VOCAB
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    torch.manual_seed(0)
    alphabet = [*"the Verfahren  law123模型百x\n", "   ", "😀", "<reserved_106>", "    ", *WORDS]
    texts = ["".join(alphabet[i] for i in torch.randint(len(alphabet), (20,)).tolist()) for _ in range(300)]
    for text in (*texts, *pieces.PROBES):
        ids = tokenizer(text)["input_ids"]
        assert ids == theirs.encode(text), text
        assert tokenizer.decode(ids) == theirs.decode(ids)
    assert not (folder / "ran").exists()


def test_bos_is_put_where_the_folder_asks_for_it(spm):
    tokenizer = pieces.fast_tokenizer(spm, {"add_bos_token": True, "add_eos_token": True})
    ids = tokenizer("the law")["input_ids"]
    assert (ids[0], ids[-1]) == (1, 2)
    assert ids[1:-1] == tokenizer("the law", add_special_tokens=False)["input_ids"]


def test_a_space_before_the_text_where_the_file_has_one(tmp_path, spm):
    lines = (spm.parent / "text").read_text().splitlines()
    file = train_pieces(tmp_path, lines)  # sentencepiece's defaults: NFKC, spaces squeezed, one in front
    tokenizer, theirs = pieces.fast_tokenizer(file, {}), sentencepiece.SentencePieceProcessor(model_file=str(file))
    for text in (*pieces.PROBES, *WORDS, " ".join(WORDS)):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == theirs.encode(text), text
    assert tokenizer.decode(theirs.encode("the law of x")) == "the law of x"
    with pytest.raises(UserError, match="a space forced before the text"):
        pieces.fast_tokenizer(train_pieces(tmp_path, lines, user_defined_symbols=["<r>"]), {})


def test_the_conversion_is_kept_and_another_checkpoint_gets_its_own(folder):
    first = models.snapshot(str(folder))
    before = {file.name: file.stat().st_mtime_ns for file in first.iterdir()}
    assert models.snapshot(str(folder)) == first
    assert {file.name: file.stat().st_mtime_ns for file in first.iterdir()} == before
    other = weights(seed=1)  # the same shapes, names and sizes
    for shard in ("a.safetensors", "b.safetensors"):
        save_file({name: other[name] for name in load_file(folder / shard)}, folder / shard)
    second = models.snapshot(str(folder))
    assert second != first
    names = [load_file(f)["model.norm.weight"] for f in sorted(second.glob("*.safetensors")) if holds(f)]
    assert torch.equal(names[0], other["model.norm.weight"])


def holds(file: Path) -> bool:
    return "model.norm.weight" in load_file(file)


def test_a_trained_run_exports_a_llama(folder, tmp_path):
    """Slices on the converted base; the export loads without this package, and audit takes the original's path."""
    base = models.snapshot(str(folder))
    shape = shapes.from_config(models.config_json(base))
    neurons = NeuronSet.from_flat(torch.tensor([3, INNER + 1, 2 * INNER + 5]), shape)
    model = models.load_model(str(folder), ModelConfig(dtype="float32"), torch.device("cpu"))
    attach(model, neurons)
    rows = torch.full((1, HIDDEN), 0.125)
    patches = {"model.layers.0.mlp.gate_proj.weight": Patch("row", torch.tensor([3]), rows)}
    export_model(base, patches, tmp_path / "run/model")
    neurons.save(tmp_path / "run/neurons.safetensors")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert torch.equal(exported.model.layers[0].mlp.gate_proj.weight[3], rows[0])
    assert json.loads((tmp_path / "run/model/config.json").read_text())["model_type"] == "llama"
    report = audit(models.snapshot(str(folder)), tmp_path / "run")
    assert report.ok, str(report)
    assert report.changed["gate"] == HIDDEN


def test_the_shape_is_known_before_anything_is_converted(folder):
    shape = shapes.resolve(str(folder))
    model = models.load_model(str(folder), ModelConfig(dtype="float32"), torch.device("cpu"))
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    published = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    real = CONFIG | published | {"max_position_embeddings": 4096, "vocab_size": 125_696}
    assert shapes.from_config(real, "Baichuan2-7B") == shapes.known("Baichuan2-7B")


def test_pickled_weights_only_by_the_command(folder, tmp_path, capsys):
    safe = models.snapshot(str(folder))
    for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        file.unlink()
    torch.save(weights(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"slicetune baichuan DIR NEW"):
        models.snapshot(str(folder))
    assert commands.main(["baichuan", str(folder), str(tmp_path / "new")]) == 0
    one, other = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (safe, tmp_path / "new"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    torch.save({"a": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(SystemExit) as stop:
        commands.main(["baichuan", str(folder), str(tmp_path / "evil")])
    assert stop.value.code == 2
    assert "no file of tensors alone" in capsys.readouterr().err
    assert not Evil.ran
    assert not (tmp_path / "evil").exists()


class Evil:
    ran = False

    def __reduce__(self):
        return (setattr, (Evil, "ran", True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["BaiChuanForCausalLM"]}, "only Baichuan2-7B is known"),
        ({"hidden_size": 5120}, "only Baichuan2-7B is known"),
        ({"hidden_size": 64}, "not 3 × 64 rows"),
        ({"num_hidden_layers": 3}, "no tensor of that name"),
        ({"intermediate_size": 64}, "config.json makes it"),
        ({"hidden_act": "quick_gelu"}, "another activation"),
    ],
)
def test_relatives_and_damage_are_one_line(folder, change, words):
    write(folder / "config.json", CONFIG | change)
    with pytest.raises(UserError, match=words) as caught:
        models.snapshot(str(folder))
    assert "\n" not in str(caught.value)


def test_files_that_are_missing_or_damaged_are_one_line(folder):
    write(folder / "config.json", {k: v for k, v in CONFIG.items() if k != "max_position_embeddings"})
    with pytest.raises(UserError, match="only Baichuan2-7B is known"):  # the 13B models
        models.snapshot(str(folder))
    write(folder / "config.json", {k: v for k, v in CONFIG.items() if k != "rms_norm_eps"})
    with pytest.raises(UserError, match="has no rms_norm_eps"):
        models.snapshot(str(folder))
    write(folder / "config.json", CONFIG)
    (folder / "tokenizer.model").write_bytes(b"\xff\xff")
    with pytest.raises(UserError, match=r"tokenizer\.model: not a sentencepiece model"):
        models.snapshot(str(folder))
    (folder / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.model: not a sentencepiece model"):
        models.snapshot(str(folder))
