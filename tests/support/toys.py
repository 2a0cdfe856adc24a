"""Small real things that the tests share: a Llama of two layers, sentences of random tokens, a neuron set."""

from __future__ import annotations

import copy
import random
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from slicetune.engine.data.batching import Example
from slicetune.engine.data.config import DataConfig
from slicetune.engine.methods.landermt.routes import GENERAL, NOBODY, Routes
from slicetune.engine.models.config import ModelConfig
from slicetune.engine.run.config import RunConfig
from slicetune.engine.slices.ffn import attach
from slicetune.engine.slices.linear import SliceLinear
from slicetune.engine.slices.neurons import NeuronSet
from slicetune.engine.training.config import TrainConfig, ZeroConfig
from slicetune.engine.training.order import Order
from slicetune.engine.training.train import Setup, train

HIDDEN, INTERMEDIATE, LAYERS, VOCAB = 32, 48, 2, 64
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    llama = LlamaForCausalLM(config).to(dtype)
    llama.config.use_cache = False
    return llama.eval()


def bloom(seed: int = 0, dtype: torch.dtype = torch.float32) -> BloomForCausalLM:
    torch.manual_seed(seed)
    config = BloomConfig(
        hidden_size=HIDDEN, n_head=4, n_layer=LAYERS, vocab_size=VOCAB, initializer_range=0.1, use_cache=False
    )
    made = BloomForCausalLM(config).to(dtype)
    for name, p in made.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)  # zero in a fresh model: a lost bias would not be seen
    return made.eval()


def routes(units: int = INTERMEDIATE, **changes: Any) -> Routes:
    """Both layers routed for three pairs of en, de, fr; odd numbers of units, some nobody's; de-en leaves layer 1."""
    draw = random.Random(1)
    owner = [[draw.choice((GENERAL, GENERAL, 0, 1, 2, NOBODY)) for _ in range(units)] for _ in range(LAYERS)]
    fields = {
        "pairs": ("de-en", "en-de", "en-fr"),
        "languages": ("de", "en", "fr"),
        "layers": (0, 1),
        "takes": torch.tensor([[True, False], [True, True], [True, True]]),
        "owner": torch.tensor(owner, dtype=torch.int16),
        "share": torch.tensor([[0.8, 0.7], [0.9, 0.6], [0.55, 0.75]]),
        "car": "general_share",
        "site": "input",
        "total_layers": LAYERS,
        "intermediate": units,
    }
    return Routes(**fields | changes)


def neurons(**slices: Any) -> NeuronSet:
    """Odd numbers of rows, so that no stage divides them evenly by the ranks; one layer has no `down`."""
    chosen = slices or {
        "0.gate.row": [1, 5, 47],
        "0.up.row": [0],
        "1.gate.row": [2, 3, 4, 7, 11],
        "1.up.row": [9, 46],
        "1.down.row": [3],
    }
    keyed = {}
    for name, index in chosen.items():
        layer, projection, axis = name.split(".")
        keyed[int(layer), projection, axis] = torch.tensor(index)
    widths = {"gate": INTERMEDIATE, "up": INTERMEDIATE, "down": HIDDEN}
    fan_in = {"gate": HIDDEN, "up": HIDDEN, "down": INTERMEDIATE}
    return NeuronSet(keyed, LAYERS, widths, fan_in)


def units() -> NeuronSet:
    """Three FFN units of one layer and one of the other, as LAPE chooses them."""
    parts = ("gate.row", "up.row", "down.column")
    return neurons(**{f"{layer}.{part}": index for layer, index in ((0, [3]), (1, [0, 17, 46])) for part in parts})


def examples(count: int, seed: int = 0, groups: int = 2, longest: int = 20) -> list[Example]:
    draw = random.Random(seed)
    made = []
    for i in range(count):
        length = draw.randint(6, longest)
        ids = [draw.randrange(VOCAB) for _ in range(length)]
        made.append(Example(ids, draw.randint(2, length - 2), i % groups, f"toy/train/{i}"))
    return made


def config(out: str, **overrides: Any) -> RunConfig:
    """A run's settings; `train_x`, `zero_x`, `model_x`, `data_x` set fields of its parts."""
    base = RunConfig(
        out=out,
        model=ModelConfig(dtype="float32"),
        data=DataConfig(train_sentences=23),
        train=TrainConfig(learning_rate=1e-2, epochs=2, weight_decay=0.1, logging_steps=1, report_to=()),
        zero=ZeroConfig(),
    )
    for name, value in overrides.items():
        part, _, field = name.partition("_")
        if part in ("train", "zero", "model", "data", "score"):
            setattr(base, part, replace(getattr(base, part), **{field: value}))
        else:
            setattr(base, name, value)
    return base


def trained(model: torch.nn.Module, config: RunConfig, sentences: list[Example], out: Path) -> Path:
    """Train with a run's settings; the dev loss is of the first sentences of `examples`. The checkpoint's folder."""
    dev = examples(config.data.train_sentences)[:4]
    compiled, tokens = config.model.compile == "blocks", config.score.batch_tokens
    setup = Setup(0, config.zero.stage, config.seed, config.resume, compiled, tokens)
    return train(model, config.train, setup, sentences, dev, out, {"toy": 1})


def named_slices(model: torch.nn.Module) -> Iterator[tuple[str, str, torch.nn.Parameter, torch.Tensor]]:
    """(tensor name in the checkpoint, axis, parameter, index) of every trained slice, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, SliceLinear):
            for parameter, tensor, axis, index in (
                (module.rows, "weight", "row", module.row_index),
                (module.columns, "weight", "column", module.column_index),
                (module.bias_rows, "bias", "row", module.row_index),
            ):
                if parameter is not None:
                    yield f"{name}.{tensor}", axis, parameter, index


def bytes_tokenizer(chat: bool) -> PreTrainedTokenizerFast:
    """One token a byte, with or without a chat template."""
    special = ["<pad>", "<s>", "</s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=special[3:],
    )
    fast.chat_template = CHAT if chat else None
    return fast


def model_of_bytes(kind: str) -> torch.nn.Module:
    """A random `llama` or `bloom` with the vocabulary of `bytes_tokenizer`."""
    torch.manual_seed(1)
    if kind == "bloom":
        config = BloomConfig(vocab_size=263, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)
        return BloomForCausalLM(config).eval()
    config = LlamaConfig(
        vocab_size=263,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    model.config.use_cache = False  # as load_model leaves it
    return model


def trained_by_hand(steps: int = 10, left_out: Collection[int] = ()) -> dict[str, torch.Tensor]:
    """Rows by `<module>.rows` after the settings of `config`, written out: dense gradients, everything in float64.

    Updates `left_out` (from 1) are not made.
    """
    dense, chosen = model(dtype=torch.float64), neurons()
    attach(copy.deepcopy(dense), chosen)
    settings = config("")
    data = examples(settings.data.train_sentences)
    order = Order(settings.seed, len(data), settings.train.global_batch_size)
    params = dict(dense.named_parameters())
    rows = {f"model.layers.{layer}.mlp.{p}_proj": i for (layer, p, _), i in chosen.slices.items()}
    state = {k: params[f"{k}.weight"].detach()[i].clone().requires_grad_() for k, i in rows.items()}
    optimizer = torch.optim.AdamW(state.values(), lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        if step + 1 in left_out:
            continue
        update = order.update(*divmod(step, order.updates_per_epoch))
        tokens = sum(len(data[i].input_ids) - data[i].target_start for i in update)
        loss = 0.0
        for i in update:
            ids = torch.tensor([data[i].input_ids])
            logits = dense(ids, use_cache=False).logits[0, data[i].target_start - 1 : -1]
            loss = loss + torch.nn.functional.cross_entropy(logits, ids[0, data[i].target_start :], reduction="sum")
        grads = torch.autograd.grad(loss / tokens, [params[f"{k}.weight"] for k in rows])
        for (k, i), g in zip(rows.items(), grads, strict=True):
            state[k].grad = g[i]
        optimizer.step()
        with torch.no_grad():
            for k, i in rows.items():
                params[f"{k}.weight"][i] = state[k]
    return {f"{k}.rows": value.detach() for k, value in state.items()}
