"""--model.compile blocks against off: losses, graphs that stay whole, few of them, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import toys
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM

from slicetune.engine.common.errors import UserError
from slicetune.engine.data.batching import pack, pad
from slicetune.engine.methods.base import Full
from slicetune.engine.methods.landermt import routing
from slicetune.engine.methods.lora import Dora, Lora
from slicetune.engine.models.config import ModelConfig
from slicetune.engine.models.large.partition import same_sums
from slicetune.engine.models.load import checkpoint_activations
from slicetune.engine.models.shapes import from_config
from slicetune.engine.run.config import RunConfig
from slicetune.engine.scoring.loss import target_losses
from slicetune.engine.slices.ffn import attach
from slicetune.engine.slices.neurons import NeuronSet
from slicetune.engine.slices.optim import SparseColumnAdamW
from slicetune.engine.training.compiled import compile_blocks
from slicetune.engine.training.config import ZeroConfig
from slicetune.engine.training.updates import Batcher

LAYERS = 4


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


def sliced(kind: str, dtype: torch.dtype = torch.float32, recompute: bool = False, columns: bool = False) -> nn.Module:
    """Four blocks that train different numbers of rows; with `columns` the last of its last projection."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": LAYERS, "vocab_size": toys.VOCAB, "initializer_range": 0.1, "pad_token_id": 0}
    sizes |= {"head_dim": 8, "sliding_window": 8} if kind == "gemma2" else {}
    sizes = {"hidden_size": 32, "n_head": 4, "n_layer": LAYERS, "vocab_size": toys.VOCAB} if kind == "bloom" else sizes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).to(dtype)
    model.config.use_cache = False
    shape = from_config(model.config)
    first, *_, last = shape.widths
    chosen = {(layer, first, "row"): torch.arange(layer + 2) for layer in range(LAYERS)}
    chosen |= {(layer, last, "row"): torch.arange(3, 9 - layer) for layer in range(LAYERS)}
    if columns:
        del chosen[LAYERS - 1, last, "row"]
        chosen[LAYERS - 1, last, "column"] = torch.tensor([1, 4, 7])
    attach(model, NeuronSet(chosen, shape.layers, dict(shape.widths), dict(shape.fan_in)), recompute)
    return model.train()


def updates(model: nn.Module, steps: int = 20, packed: bool | None = None, groups: int = 2) -> list[float]:
    """The loss of every update; batches of other lengths, packed and padded in turn where `packed` is None."""
    optimizer = SparseColumnAdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.1)
    losses = []
    for step in range(steps):
        batcher = Batcher(step % 2 == 0 if packed is None else packed, 0, routing.router_of(model))
        sentences = [e for e in toys.examples(3 * groups, step, groups, 12 + step) if groups < 3 or e.group == step % 3]
        loss = target_losses(model, batcher(sentences)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_same(make: Callable[[], nn.Module], graphs: int, rel: float = 1e-5, **how) -> None:
    expected, model = updates(make(), **how), make()
    assert compile_blocks(model, "aot_eager") == model.config.num_hidden_layers
    assert updates(model, **how) == pytest.approx(expected, rel=rel)
    assert not counters["graph_break"]
    assert 0 < counters["stats"]["unique_graphs"] <= graphs
    assert expected[-1] != expected[0]


@pytest.mark.parametrize(("kind", "packed"), [("llama", None), ("qwen2", True), ("gemma2", True), ("bloom", False)])
def test_losses_are_those_of_the_plain_model(kind, packed):
    """Blocks that train other numbers of neurons, and batches of other lengths, share what is compiled.

    The first block's input has no gradient: two graphs, one more for Gemma-2's windows or where a block trains columns,
    and as many again for the other kind of batch.
    """
    llama = kind == "llama"
    assert_same(lambda: sliced(kind, columns=llama), graphs=6 if llama else 2 + (kind == "gemma2"), packed=packed)


def test_with_activation_checkpointing_and_zeros_hooks():
    def make():
        model = sliced("llama")
        checkpoint_activations(model)
        same_sums(model)
        return model

    assert_same(make, graphs=3, packed=True)


def test_with_the_ffn_computed_again():
    assert_same(lambda: sliced("llama", recompute=True), graphs=2, packed=True)


def test_no_more_is_kept_for_the_backward():
    """Bytes that autograd saves of a batch: the compiler computes h again, as the FFN does uncompiled."""
    batch, model = pack(toys.examples(5)), sliced("llama")
    plain = saved(lambda: target_losses(model, batch), model)
    compile_blocks(model, "aot_eager")
    target_losses(model, batch)
    assert saved(lambda: target_losses(model, batch), model) <= plain


def saved(forward: Callable[[], torch.Tensor], model: nn.Module) -> int:
    own, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = forward()
    total = sum(size for address, (size, _) in found.items() if address not in own)
    del losses
    return total


def test_in_bf16():
    assert_same(lambda: sliced("llama", torch.bfloat16), graphs=2, rel=2e-2, packed=True, steps=6)


def prepared(method) -> Callable[[], nn.Module]:
    def make():
        model = toys.model()
        method.prepare(model, None)
        return model.train()

    return make


@pytest.mark.parametrize("method", [Lora(rank=2), Full()], ids=["lora", "full"])
def test_methods_that_fuse_nothing(method):
    assert_same(prepared(method), graphs=3, packed=True, steps=6)


def test_routed_models():
    def make():
        model, routes = toys.model(), toys.routes()
        routing.attach(model, routes, routes.pairs)
        return model.train()

    assert_same(make, graphs=3, packed=True, steps=8, groups=3)


def test_evaluation_is_not_compiled():
    model = sliced("llama")
    compile_blocks(model, "aot_eager")
    batch = pack(toys.examples(4))
    with torch.no_grad():
        losses = target_losses(model, batch)
    model.eval()
    assert torch.equal(target_losses(model, batch), losses)
    assert torch.equal(target_losses(sliced("llama"), batch), losses)
    assert not counters["stats"]


def test_by_inductor_under_zero_on_two_ranks(pool, tmp_path):
    """The engine's own loop at stages 1 and 2, as it is by default: C++ from the compiler, dev loss in between."""
    settings = {"train_max_steps": 20, "train_epochs": 10, "train_eval_steps": 7}
    plain, *_ = pool.run("train_compiled", str(tmp_path / "off"), settings)[0]
    for stage in (1, 2):
        compiled = settings | {"model_compile": "blocks", "zero_stage": stage}
        losses, graphs, breaks = pool.run("train_compiled", str(tmp_path / str(stage)), compiled, timeout=600)[0]
        assert len(losses) == 20
        assert losses == pytest.approx(plain, rel=1e-5)
        assert (graphs, breaks) == (2, 0)


def test_a_resume_may_compile(pool, tmp_path):
    """How blocks run decides no result: a run goes on with the other value."""
    settings = {"train_max_steps": 6, "train_epochs": 10}
    whole, *_ = pool.run("train_compiled", str(tmp_path / "whole"), settings | {"train_max_steps": 9})[0]
    pool.run("train_compiled", str(tmp_path / "broken"), settings)
    again = settings | {"model_compile": "blocks", "train_max_steps": 9}
    losses, *_ = pool.run("train_compiled", str(tmp_path / "broken"), again, timeout=600)[0]
    assert losses == pytest.approx(whole, rel=1e-5)


def test_what_cannot_be_compiled_is_refused_in_one_line():
    compiled = ModelConfig(compile="blocks")
    with pytest.raises(UserError, match=r"ZeRO stage 3 gathers weights within blocks: use --zero\.stage 1 or 2"):
        RunConfig(model=compiled, zero=ZeroConfig(3))
    with pytest.raises(UserError, match="DoRA cannot be traced: leave it at off"):
        RunConfig(model=compiled, method=Dora())
    with pytest.raises(UserError, match="no decoder blocks that are known: use off"):
        compile_blocks(nn.Linear(2, 2))
    assert RunConfig(model=compiled, zero=ZeroConfig(2)).model.compile == "blocks"


def test_padded_rows_of_a_block_are_compiled_once():
    """A longer row, another number of rows, and back: no further graph."""
    model = sliced("llama")
    compile_blocks(model, "aot_eager")
    for count, seed, longest in ((3, 0, 10), (5, 1, 30), (2, 2, 15), (7, 3, 12)):
        target_losses(model, pad(toys.examples(count, seed, longest=longest), 0)).mean().backward()
        assert counters["stats"]["unique_graphs"] == 2
