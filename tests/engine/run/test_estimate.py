"""The dry run's figures: the paper's, brute force on small shapes, and what autograd really saves."""

import dataclasses
import itertools
import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from slicetune.engine.common.errors import UserError
from slicetune.engine.data.config import DataConfig
from slicetune.engine.methods.adapter import Adapter, AdapterLora
from slicetune.engine.methods.base import Full
from slicetune.engine.methods.caneft.settings import Caneft
from slicetune.engine.methods.counts import trainable
from slicetune.engine.methods.landermt.settings import Layers
from slicetune.engine.methods.llama_pro import LlamaPro
from slicetune.engine.methods.lora import Lora, LoraMlp
from slicetune.engine.methods.method import Method
from slicetune.engine.models import attention as attention_module
from slicetune.engine.models.config import ModelConfig
from slicetune.engine.models.shapes import ModelShape, from_config, known, llama
from slicetune.engine.run.config import RunConfig
from slicetune.engine.run.forecast import memory
from slicetune.engine.run.forecast.estimate import chosen, corpus_of, dry_run_text
from slicetune.engine.scoring.config import ScoreConfig
from slicetune.engine.slices.ffn import fuse
from slicetune.engine.slices.neurons import NeuronSet
from slicetune.engine.training.config import TrainConfig, ZeroConfig

SMALL = llama("small", 2, 2, 3, 1, 1, 10, tied=True)
LLAMA2_7B, LLAMA31_8B, QWEN25_7B, GEMMA2_9B = map(known, ("Llama-2-7B", "Llama-3.1-8B", "Qwen2.5-7B", "Gemma-2-9B"))
GIGA = 10**9


def config(**fields) -> RunConfig:
    return RunConfig(**{"data": DataConfig(dir="no-such-corpus")} | fields)


@pytest.mark.parametrize(
    ("shape", "minimum", "expectation", "maximum"),
    [(LLAMA2_7B, 34.2, 43.3, 92.0), (LLAMA31_8B, 42.9, 56.4, 150.3), (QWEN25_7B, 41.6, 57.0, 220.0)],
    ids=["llama2", "llama31", "qwen25"],
)
def test_ranges_of_the_papers_models(shape, minimum, expectation, maximum):
    got = trainable(shape, 0.01)
    millions = [value / 1e6 for value in (got.minimum, got.expectation, got.maximum)]
    assert millions == pytest.approx([minimum, expectation, maximum], abs=0.052)  # 42.951 stands as 42.9


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.125, 0.25, 0.5, 0.9, 1.0])
def test_range_is_that_of_all_choices(ratio):
    costs = [2] * 6 + [2] * 6 + [3] * 4  # gate, up and down rows of two layers, H=2, I=3
    count = int(ratio * len(costs) + 0.5)
    sums = [sum(choice) for choice in itertools.combinations(costs, count)]
    got = trainable(SMALL, ratio)
    assert (got.neurons, got.minimum, got.maximum) == (count, min(sums), max(sums))
    assert got.expectation == pytest.approx(sum(sums) / len(sums), rel=1e-12)


def test_biases_belong_to_their_rows():
    bloom = dataclasses.replace(SMALL, gated=False, mlp_bias=True)
    assert trainable(bloom, 1.0).minimum == 2 * (3 * 2 + 3 + 2 * 3 + 2) == trainable(bloom, 1.0).maximum


def test_exact_number_once_neurons_are_chosen(tmp_path):
    run = config(out=str(tmp_path), method=Caneft(neuron_ratio=0.25))
    assert chosen(run, SMALL).exact is None
    NeuronSet.from_flat(torch.tensor([0, 3, 6, 15]), SMALL).save(tmp_path / "neurons.safetensors")
    got = chosen(run, SMALL)
    assert (got.neurons, got.exact) == (4, 2 + 2 + 3 + 3)
    assert "10  = " in re.search(r"exact .*", dry_run_text(run, SMALL, 1))[0]
    with pytest.raises(UserError, match="another shape"):
        chosen(run, dataclasses.replace(SMALL, intermediate=4))


@pytest.mark.parametrize(
    ("kind", "attention", "packed"),
    [
        ("llama", "sdpa", True),
        ("qwen2", "sdpa", True),
        ("llama", "flash", False),
        ("llama", "eager", True),
        ("gemma2", "eager", True),
        ("bloom", "eager", False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_saved_activations_are_what_autograd_saves(kind, attention, packed, dtype):
    """A block's bytes a token: the difference of models of three layers and one, every storage counted once.

    Without packing, CPU sdpa saves what flash-attn does.
    """
    tokens = 128
    path = "sdpa" if attention == "flash" else attention
    one, three = (_saved(kind, layers, dtype, tokens, path, packed) for layers in (1, 3))
    measured = (three - one) / 2 / tokens
    expected = memory.saved_per_token(_shape(kind), dtype.itemsize, attention, tokens)
    assert expected == pytest.approx(measured, rel=0.05 if kind == "gemma2" else 0.01)


def _config(kind: str, layers: int):
    if kind == "bloom":
        return AutoConfig.for_model("bloom", hidden_size=128, n_head=4, n_layer=layers, vocab_size=50)
    extra = {"head_dim": 32} if kind == "gemma2" else {}
    return AutoConfig.for_model(
        kind,
        hidden_size=128,
        intermediate_size=448,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=layers,
        vocab_size=50,
        **extra,
    )


def _shape(kind: str) -> ModelShape:
    return from_config(_config(kind, 1))


NOT_FUSED = [
    *(("llama", method) for method in (Full(), Lora(), LoraMlp(), LlamaPro(blocks=1), Adapter(width=40))),
    ("llama", Lora(target_modules=("q_proj", "v_proj"))),
    ("llama", AdapterLora(width=40, rank=1, target_modules=("q_proj", "v_proj"))),
    ("bloom", Adapter(width=40)),
    ("bloom", Lora(rank=1, target_modules=("query_key_value",))),
]


@pytest.mark.parametrize(("kind", "method"), NOT_FUSED, ids=lambda value: getattr(value, "kind", value))
def test_saved_activations_of_methods_that_do_not_fuse(kind, method):
    path = "eager" if kind == "bloom" else "sdpa"
    one, three = (_saved(kind, layers, torch.float32, 128, path, kind != "bloom", method) for layers in (1, 3))
    values = method.saved_values(_shape(kind))
    expected = memory.saved_per_token(_shape(kind), 4, path, 128, values)
    assert expected == pytest.approx((three - one) / 2 / 128, rel=0.02)  # an adapter's few values are not counted


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_saved_activations_of_one_trained_block_of_three(kind):
    """Layers with k=1: what three blocks save beyond one is what two frozen blocks save."""
    path, method, routes = "eager" if kind == "bloom" else "sdpa", Layers(k=1), SimpleNamespace(layers=(0,))
    one, three = (_saved(kind, n, torch.float32, 128, path, kind != "bloom", method, routes) for n in (1, 3))
    shapes = [dataclasses.replace(_shape(kind), layers=n) for n in (1, 3)]
    single, triple = (memory.saved_per_token(s, 4, path, 128, method.saved_values(s)) for s in shapes)
    assert 3 * triple - single == pytest.approx((three - one) / 128, rel=0.01)
    full = memory.saved_per_token(shapes[0], 4, path, 128, Full().saved_values(shapes[0]))
    assert single == full


def _saved(
    kind: str,
    layers: int,
    dtype: torch.dtype,
    tokens: int,
    attention: str,
    packed: bool,
    method: Method | None = None,
    neurons: Any = None,
) -> int:
    """Bytes of all storages but the parameters' that a forward saves, of scoring or of a method's training."""
    model = AutoModelForCausalLM.from_config(_config(kind, layers), attn_implementation=attention).to(dtype)
    model.requires_grad_(False)
    if method:
        method.prepare(model, neurons, groups=config().data.directions_of_groups)
    for ffn in [] if method else fuse(model):
        ffn.tap = SimpleNamespace(anchor=None)  # any tap makes the FFN keep y
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor keeps the address from being reused
        return tensor

    inputs = {"input_ids": torch.zeros(1, tokens, dtype=torch.int64), "use_cache": False}
    if packed:
        inputs["position_ids"] = torch.arange(tokens // 2).repeat(2)[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(**inputs)
    return sum(size for size, _ in saved.values())


def parts(rows: list[memory.Part]) -> dict[str, int]:
    return {row.name: row.bytes for row in rows}


def test_scoring_memory_of_an_8b_model():
    rows = memory.scoring(config(), LLAMA31_8B)
    got = parts(rows)
    assert got["weights"] == 2 * 8_030_261_248
    assert got["histogram counts"] == 4 * 1_048_576 * 256 * 4  # 4.3 GB
    assert got["logits"] == 523 * 128_256 * 8  # a chunk of them
    assert memory.device_total(rows) == sum(got.values())
    on_host = config(score=ScoreConfig(counts="host"))
    assert memory.device_total(memory.scoring(on_host, LLAMA31_8B)) == sum(got.values()) - got["histogram counts"]


@pytest.mark.parametrize(("stage", "gradients"), [(1, 1), (2, 8), (3, 8)])
def test_training_memory_by_stage(stage, gradients):
    p, world, tokens = 56_372_736, 8, 512
    got = parts(memory.training(config(zero=ZeroConfig(stage)), LLAMA31_8B, world, p, tokens))
    assert got["fp32 masters, two moments"] == p * 12 // world
    assert got["fp32 gradients"] == p * 4 // gradients
    assert got["weights and slices"] == 2 * (8_030_261_248 + p) // (8 if stage == 3 else 1)
    assert ("gathered weights" in got) == (stage == 3)
    if stage == 1:
        assert got["a backward's gradients"] == p * 2
    else:
        assert got["a bucket of gradients"] == 500_000_000 * 2 + p * 4


def test_checkpointing_saves_inputs_and_one_block():
    off, on = (config(model=ModelConfig(attention="flash", activation_checkpointing=how)) for how in ("off", "on"))
    tokens = 100
    block = memory.saved_per_token(LLAMA31_8B, 2, "flash", tokens)
    assert block == 118_912  # two fp32 norms, q k v and output, 32 log-sums, x gate up
    assert memory.activations(off, LLAMA31_8B, tokens, tokens).bytes == 32 * 100 * block
    assert memory.activations(on, LLAMA31_8B, tokens, tokens).bytes == 100 * (32 * 8192 + block)


def test_rows_of_scores_do_not_grow_with_a_scoring_batch():
    """Eager scoring pads sentences into rows of their own; eager training packs a forward's sentences into one row."""
    run = config(model=ModelConfig(attention="eager"), data=DataConfig(dir="no-such-corpus", max_length=128))
    row = memory.saved_per_token(GEMMA2_9B, 2, "eager", 128)
    assert parts(memory.scoring(run, GEMMA2_9B))["activations, no checkpointing"] == 4096 * 42 * row
    packed = memory.saved_per_token(GEMMA2_9B, 2, "eager", 384)
    assert packed - row == 16 * 256 * 8
    assert parts(memory.training(run, GEMMA2_9B, 1, 1, 384))["activations, no checkpointing"] == 384 * 42 * packed


def test_rows_padded_for_scoring_have_no_mask():
    """sdpa keeps of them what flash-attn keeps; a packed row of several sentences has a mask and repeated keys."""
    run = config(model=ModelConfig(attention="sdpa"))
    row = memory.saved_per_token(LLAMA31_8B, 2, "flash", 512)
    assert parts(memory.scoring(run, LLAMA31_8B))["activations, no checkpointing"] == 4096 * 32 * row
    packed = memory.saved_per_token(LLAMA31_8B, 2, "sdpa", 2048)
    assert parts(memory.training(run, LLAMA31_8B, 1, 1, 2048))["activations, no checkpointing"] == 2048 * 32 * packed
    assert packed - row == 2 * (4096 - 1024) * 2 + 2048 * 2


def test_full_fine_tuning_holds_the_heads_gradient():
    got = parts(memory.training(config(method=Full()), LLAMA31_8B, 8, LLAMA31_8B.parameters, 512, 0))
    assert got["the output head's gradient"] == 128_256 * 4096 * 6
    assert got["logits"] == 256 * 128_256 * 8  # all of them, where a chunk is larger


def test_gemma_needs_eager_or_flash(monkeypatch):
    assert memory.attention_path(config(model=ModelConfig(attention="sdpa")), GEMMA2_9B) == "eager"
    assert memory.attention_path(config(model=ModelConfig(attention="flash")), GEMMA2_9B) == "flash"
    assert memory.attention_path(config(model=ModelConfig(attention="sdpa")), LLAMA31_8B) == "sdpa"
    for installed, paths in ((None, ("eager", "varlen", "sdpa")), (object(), ("flash", "flash", "flash"))):
        monkeypatch.setattr(attention_module.importlib.util, "find_spec", lambda name, found=installed: found)
        runs = (config(), GEMMA2_9B), (config(), LLAMA31_8B), (config(model=ModelConfig(dtype="float32")), LLAMA31_8B)
        assert tuple(memory.attention_path(*run) for run in runs) == paths


def test_steps_and_shares():
    run = config(train=TrainConfig(global_batch_size=6, micro_batch_size=2, epochs=3))
    text = dry_run_text(run, LLAMA31_8B, 2)
    assert "an epoch  1,334 optimizer steps" in text  # ⌈8000 / 6⌉
    assert "in all    4,002 optimizer steps, 3 epoch(s)" in text
    assert "6 sentences = 2 rank(s) × 2 forward(s) × up to 2" in text
    assert "train.max_steps                 0 → 4002" in text
    run.train.max_steps = 667
    assert "in all    667 optimizer steps, 0.5 epoch(s)" in dry_run_text(run, LLAMA31_8B, 2)


def test_a_local_corpus_is_counted(tmp_path):
    for domain, lines in (("it", 30), ("law", 7)):
        folder = tmp_path / "de-en" / domain
        folder.mkdir(parents=True)
        pairs = [{"translation": {"de": f"{i:050d}", "en": f"{i:020d}"}} for i in range(lines)]
        for split in ("train", "dev", "test"):
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    run = config(
        data=DataConfig(dir=str(tmp_path), seen=("it", "law"), unseen=(), score_sentences=20, train_sentences=10)
    )
    corpus = corpus_of(run)
    assert corpus.scored == {"it": 20, "law": 7}
    assert corpus.trained == {"it": 10, "law": 7}
    assert "70 characters a pair" in corpus.source


def test_every_setting_is_printed():
    text = dry_run_text(config(seed=17), QWEN25_7B, 4)
    for name in (
        "model.path",
        "data.seen",
        "score.token_reduce",
        "method.neuron_ratio",
        "zero.stage",
        "evaluate.base",
    ):
        assert re.search(rf"^  {re.escape(name)} ", text, re.M), name
    assert re.search(r"^  seed +17$", text, re.M)
    assert "1,161,216  = 28 layers × (18,944 gate + 18,944 up + 3,584 down)" in text
