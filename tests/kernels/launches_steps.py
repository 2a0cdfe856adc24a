"""Counts what scoring and training a small Llama launch, upload, compile and wait for on an H100 that is not there.

    python launches_steps.py score|target|training|widths         # prints JSON

The engine's own code runs: the tapped or sliced model, its losses, its optimizer. `widths` are the ops of a training
step alone, at the widths of Llama-3.1-8B, where slice gradients choose among more tiles.
"""

import json
import random
import sys
from collections.abc import Callable

import fake_gpu
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM
from waits import Waits

from slicetune.engine.data.batching import Batch, Example, pack, pad
from slicetune.engine.models import shapes
from slicetune.engine.models.shapes import ModelShape
from slicetune.engine.scoring import passes as scoring
from slicetune.engine.scoring.config import ScoreConfig
from slicetune.engine.scoring.loss import target_losses, token_weights
from slicetune.engine.scoring.statistics import Statistics
from slicetune.engine.slices import ffn
from slicetune.engine.slices.neurons import NeuronSet
from slicetune.engine.slices.optim import SparseColumnAdamW
from slicetune.engine.slices.written import leave_to_optimizer
from slicetune.engine.training.guard import FiniteWatch
from slicetune.kernels.common.outputs import buffer_of
from slicetune.kernels.gated.op import gated_backward, gated_forward
from slicetune.kernels.slice_gradient import compact_gradient, row_gradient

gpu = fake_gpu.install(compiles=False)

BATCHES, FIRST = 300, 10
TOKENS = 4096  # of a padded batch for scoring
GROUPS = ("it", "law", "medical", "koran")
VOCABULARY = 64
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "use_cache",
)
ROWS = {"gate": (120, 165), "up": (120, 165), "down": (30, 52)}  # trained in a layer: 1 % of an 8B model


def shape_of(layers: int) -> ModelShape:
    return shapes.llama("small", layers, 64, 176, 2, 2, VOCABULARY)


def llama(shape: ModelShape) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=VOCABULARY,
        use_cache=False,
    )
    return LlamaForCausalLM(config).bfloat16()


def phi3(shape: ModelShape) -> Phi3ForCausalLM:
    """Gate and up in one layer."""
    torch.manual_seed(0)
    config = Phi3Config(**{k: v for k, v in llama(shape).config.to_dict().items() if k in SIZES}, pad_token_id=0)
    return Phi3ForCausalLM(config).bfloat16()


def sentence(draw: random.Random, length: int) -> Example:
    return Example([1] * length, draw.randrange(1, length), draw.randrange(len(GROUPS)), "it/train/0")


def padded(draw: random.Random) -> Batch:
    """As many sentences as TOKENS has room for, of random lengths."""
    width = draw.randint(12, 160)
    count = TOKENS // width
    return pad([sentence(draw, width)] + [sentence(draw, draw.randint(8, width)) for _ in range(count - 1)], 0)


def packed(draw: random.Random) -> Batch:
    return pack([sentence(draw, draw.randint(12, 160)) for _ in range(draw.randint(1, 12))])


class Scoring:
    """The scoring pass, a batch at a time."""

    batch = staticmethod(padded)

    def __init__(self, layers: int, tokens: str) -> None:
        shape, config = shape_of(layers), ScoreConfig(tokens=tokens)
        self.model, self.statistics = llama(shape).eval(), Statistics(list(GROUPS), shape)
        self.tap = scoring.ScoreTap(self.statistics, config)
        self.tapped = scoring.tapped(self.model, self.tap)
        self.tapped.__enter__()

    def __call__(self, batch: Batch) -> None:
        self.tap.begin(batch)
        scoring.backpropagate(self.model, batch, "mean")


class Training:
    """Updates of slices, each layer with its own number of them."""

    batch = staticmethod(packed)

    def __init__(self, layers: int, make: Callable[[ModelShape], nn.Module] = llama) -> None:
        shape, draw = shape_of(layers), random.Random(0)
        self.model = make(shape).train()
        slices = {
            (layer, role, "row"): torch.tensor(sorted(draw.sample(range(shape.widths[role]), draw.randint(*most))))
            for layer in range(layers)
            for role, most in ROWS.items()
        }
        params = ffn.attach(self.model, NeuronSet(slices, layers, dict(shape.widths), dict(shape.fan_in), {}))
        self.watch = FiniteWatch(params)
        self.optimizer = SparseColumnAdamW(params, lr=1e-3)
        leave_to_optimizer(self.model)

    def __call__(self, batch: Batch) -> None:
        loss = (target_losses(self.model, batch) * token_weights(batch)).sum() / len(batch.target)
        loss.backward()
        self.watch.check(loss, batch, 0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Widths:
    """The ops of a training step, on memory that nobody has written."""

    batch = staticmethod(packed)

    def __init__(self, layers: int) -> None:
        draw = random.Random(0)
        self.layers = [[torch.arange(draw.randint(*most)) for most in ROWS.values()] for _ in range(layers)]

    def __call__(self, batch: Batch) -> None:
        tokens = batch.input_ids.numel()
        for gate, up, down in self.layers:
            dh, g, u = (torch.empty(tokens, 14336, dtype=torch.bfloat16) for _ in range(3))
            x, dy = (torch.empty(tokens, 4096, dtype=torch.bfloat16) for _ in range(2))
            gated_forward(g, u, "silu")
            asked = {"gate_columns": gate, "up_columns": up, "emit_h": True, "inplace": True}
            compact_gradient(buffer_of(gated_backward(dh, g, u, "silu", **asked).dgate_columns), x)
            row_gradient(dy, dh, down)


def specialisations(work: Callable[[Batch], None], batches: list[Batch]) -> dict:
    """What is compiled in the first batches, and what is later."""
    for batch in batches[:FIRST]:
        work(batch)
    first = len(gpu.compiled)
    for batch in batches[FIRST:]:
        work(batch)
    return {"first": first, "later": gpu.compiled[first:], "compiled": gpu.compiled}


def step(work: Callable[[Batch], None], batch: Batch) -> dict:
    """What one batch costs when others have gone before."""
    work(batch)
    gpu.begin()
    work(batch)
    tensors = sum(isinstance(value, torch.Tensor) for value in vars(batch).values())  # each a copy to the device
    counted = {"launches": gpu.counts(), "uploads": gpu.uploads, "batch": tensors}
    with Waits() as waits:
        work(batch)
    counted["writes"] = waits.operations["index_copy_"]
    return counted | {"ours": dict(waits.ours), "others": dict(waits.others)}


WORK = {
    "score": lambda layers: Scoring(layers, "all"),
    "target": lambda layers: Scoring(layers, "target"),
    "training": Training,
    "packed": lambda layers: Training(layers, phi3),
    "widths": Widths,
}


def main(kind: str) -> None:
    for layers in (2, 3):
        shape_of(layers)  # once, before memory is changed
    if kind != "widths":
        fake_gpu.zeros()
    held = fake_gpu.without_products()
    draw, work = random.Random(0), WORK[kind](3 if kind in ("training", "packed", "widths") else 2)
    found = specialisations(work, [work.batch(draw) for _ in range(BATCHES)])
    if kind != "widths":
        found["steps"] = {layers: step(WORK[kind](layers), work.batch(draw)) for layers in (2, 3)}
    print(json.dumps(found))
    del held


if __name__ == "__main__":
    main(sys.argv[1])
