"""Models that ranks share: the same weights and buffers as a whole one, each rank its part, all errors on all ranks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import architectures
import pytest
import torch
import toys
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig

from slicetune.engine.models.config import ModelConfig
from slicetune.engine.models.large import partition, plan
from slicetune.engine.models.load import load_model

KINDS = (
    "llama, MLP biases",
    "qwen2",
    "gemma2",
    "phi3",
    "glm4",
    "olmo2",
    "starcoder2",
    "gpt_neox",
    "bloom",
    "falcon, ALiBi",
    "gptj",
)
"""Tied and not, biases, packed and plain FFNs, norms of queries, layers that transformers gathers, own buffers."""
IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for number, kind in enumerate(KINDS):
        architectures.model(kind).save_pretrained(root / str(number), max_shard_size="20KB")
    return {kind: root / str(number) for number, kind in enumerate(KINDS)}


def whole(folder: Path) -> nn.Module:
    return load_model(str(folder), ModelConfig(attention="eager"), torch.device("cpu"))


def test_a_partitioned_model_is_the_whole_one_bit_for_bit(pool, folders):
    ranks = pool.run("shared_logits", [str(f) for f in folders.values()], "partitioned", IDS)
    for kind, mine, other in zip(folders, *ranks, strict=True):
        model = whole(folders[kind])
        with torch.no_grad():
            want = model(input_ids=IDS, use_cache=False).logits
        assert torch.equal(mine[0], want), kind
        assert torch.equal(other[0], want), kind
        buffers = dict(model.named_buffers())
        assert buffers.keys() == mine[1].keys(), kind
        assert all(torch.equal(tensor, mine[1][name]) for name, tensor in buffers.items()), kind
        assert mine[2] + other[2] == sum(p.numel() for p in model.parameters())
        assert abs(mine[2] - other[2]) < 0.01 * mine[2]


def test_a_model_cut_by_tensors_has_the_logits_of_the_whole_one(pool, folders):
    cut = {k: f for k, f in folders.items() if plan.together(AutoConfig.from_pretrained(f), 2, 2) == 2}
    assert folders.keys() - cut.keys() == {"bloom", "falcon, ALiBi", "gptj"}  # transformers has no plan for them
    ranks = pool.run("shared_logits", [str(f) for f in cut.values()], "parallel", IDS)
    for kind, mine, other in zip(cut, *ranks, strict=True):
        model = whole(folders[kind])
        with torch.no_grad():
            want = model(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(mine[0], want, rtol=0, atol=5e-6, msg=kind)
        assert torch.equal(mine[0], other[0]), kind  # or the ranks would go apart on a close call
        table = model.get_input_embeddings().weight.numel()
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        all_of_it = sum(p.numel() for p in model.parameters())
        assert mine[2] < (all_of_it - table) / 2 + table + 400, (kind, tied)


@pytest.mark.parametrize("held", ["partitioned", "parallel"])
def test_an_old_buffer_that_is_stored_is_computed_as_in_a_whole_model(pool, tmp_path, held):
    toys.model().save_pretrained(tmp_path)
    name = "model.rotary_emb.inv_freq"
    stored = {name: torch.ones_like(toys.model().get_buffer(name))}
    save_file(load_file(tmp_path / "model.safetensors") | stored, tmp_path / "model.safetensors", {"format": "pt"})
    [(_, buffers, _)] = pool.run("shared_logits", [str(tmp_path)], held, IDS % 8)[0]
    assert torch.equal(buffers[name], whole(tmp_path).get_buffer(name))


@pytest.mark.parametrize("held", ["partitioned", "parallel"])
def test_a_damaged_weight_is_said_by_every_rank(pool, tmp_path, held):
    """It lies in the last rank's part alone."""
    toys.model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    first, last = pool.run("refused", str(tmp_path), held)
    assert first == last
    assert "model.layers.1.mlp.up_proj.weight holds NaN" in first


def test_a_head_that_is_tied_and_differs_is_refused(pool, tmp_path):
    toys.model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    first, last = pool.run("refused", str(tmp_path), "partitioned")
    assert first == last
    assert "checkpoint has two that differ" in first


@pytest.mark.parametrize(
    ("world", "node", "heads", "size"),
    [(8, 8, 8, 8), (16, 8, 8, 8), (16, 4, 8, 4), (6, 6, 8, 2), (3, 3, 8, 1), (4, 1, 8, 4), (8, 8, 1, 1), (1, 1, 8, 1)],
)
def test_how_many_ranks_decode_together(world, node, heads, size):
    """Key heads must divide, and ranks of one machine go together where there are several."""
    config = SimpleNamespace(num_attention_heads=64, num_key_value_heads=heads, intermediate_size=28672)
    config.base_model_tp_plan = {"layers.*.mlp.down_proj": "rowwise"}
    assert plan.together(config, world, node) == size
    config.base_model_tp_plan = {"layers.*.mlp.experts": "moe"}
    assert plan.together(config, world, node) == 1


def test_limits_hold_two_blocks_and_the_head():
    model = toys.model()
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    head = model.lm_head.weight.numel()
    limits = {"max_live_parameters": 2 * block + head, "prefetch_bucket_size": block, "max_reuse_distance": 0}
    assert partition.limits(model) == limits
