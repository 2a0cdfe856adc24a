"""Tokenizer and small Llama of the embedded default, trained from nothing on the generated corpus.

The mixture is mostly `general` text and a little of each seen domain, so that the model translates passably and
has its domains' words still to learn. Two CPU threads, float32, one seed: the same bits on the same machine.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import tiny_corpus
from .tiny_grammar import GENERAL
from .tiny_lexicon import DOMAINS

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

VERSION = 1  # of this file's recipe: raise it with any change that changes the model
PAIR = "de-en"
DISPLAY = {"it": "IT", "koran": "Koran"}
SPECIAL = ("<|bos|>", "<|eot|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """Shape of a model and length of its pretraining."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    general: int  # sentences of the general text
    plain: int  # of each domain, in general words
    own: int  # of each domain's train split, in its own words
    batch: int  # sentences of one update
    learning_rate: float
    vocabulary: int = 2000


SIZES = {
    "tiny": Size(192, 512, 4, 4, general=10_000, plain=900, own=700, batch=32, learning_rate=2e-3),
    "test": Size(32, 96, 2, 2, general=1500, plain=100, own=50, batch=32, learning_rate=5e-3),
}


def build(corpus: Path, out: Path, size: str) -> None:
    """Train the tokenizer and the model of `size` on the corpus folder and save both to `out`."""
    shape = SIZES[size]
    texts = mixture(corpus, shape)
    tokenizer = train_tokenizer(texts, shape.vocabulary)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # the order of sums, and so the last bits, depends on it
    try:
        with torch.random.fork_rng(devices=[]):
            model = pretrain(texts, tokenizer, shape)
    finally:
        torch.set_num_threads(threads)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def chat(domain: str, source: str, target: str) -> str:
    """A sentence in the `short` prompt and this tokenizer's chat template."""
    system = f"Translate from German into English. Domain: {DISPLAY.get(domain, domain)}."
    return f"<|bos|><|system|>{system}<|user|>German: {source}<|assistant|>English: {target}<|eot|>"


def mixture(corpus: Path, size: Size, seed: int = 1) -> list[str]:
    """The pretraining texts.

    General sentences, and of each domain two kinds under one prompt: the first of its train split in the domain's own
    words, and more of them in general words. So the model knows both registers and by itself prefers the general one;
    what adapts it to a domain is small. No text has the source of a dev or test sentence.
    """
    held_out = {pair["de"] for file in sorted((corpus / PAIR).glob("*/[dt]e*.jsonl.gz")) for pair in read(file)}
    texts = []
    for domain in (*DOMAINS, GENERAL):
        general = (pair for pair in tiny_corpus.sentences(domain, seed, GENERAL) if pair.de not in held_out)
        count = size.general if domain == GENERAL else size.plain
        texts += [chat(domain, *pair) for pair in itertools.islice(general, count)]
        if domain != GENERAL:
            own = read(corpus / PAIR / domain / "train.jsonl.gz")[: size.own]
            texts += [chat(domain, pair["de"], pair["en"]) for pair in own]
    return texts


def read(file: Path) -> list[dict[str, str]]:
    """The sentence pairs of a split, as {"de", "en"}."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["translation"] for line in lines]


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be encoded, the corpus in about a token a word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare = [text.replace("<|bos|>", "").replace("<|eot|>", "") for text in texts]
    tokenizer.train_from_iterator((part for text in bare for part in _roles(text)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eot|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def _roles(text: str) -> list[str]:
    for role in ("<|system|>", "<|user|>", "<|assistant|>"):
        text = text.replace(role, "\n")
    return text.strip("\n").split("\n")


def new_model(size: Size, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """A seeded Llama with tied embeddings, as `pretrain` starts from."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,
        attn_implementation="sdpa",
        dtype=torch.float32,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.do_sample = False
    return model


def batches(lengths: list[int], size: Size, rng: random.Random) -> list[list[int]]:
    """Indices of every epoch's updates: sentences of similar length together, in random order."""
    out = []
    for _ in range(1):
        order = sorted(range(len(lengths)), key=lambda i: (lengths[i], rng.random()))
        epoch = [order[start : start + size.batch] for start in range(0, len(order), size.batch)]
        rng.shuffle(epoch)
        out += epoch
    return out


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over the first twentieth, then a cosine to zero."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def pretrain(texts: list[str], tokenizer: PreTrainedTokenizerFast, size: Size) -> LlamaForCausalLM:
    """Train on the English side of every text; progress goes to stderr."""
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assistant = tokenizer.convert_tokens_to_ids("<|assistant|>")
    starts = [row.index(assistant) + 1 for row in ids]
    model = new_model(size, tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    plan = batches([len(row) for row in ids], size, random.Random(0))
    begun = time.time()
    for step, chosen in enumerate(plan):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(plan), size.learning_rate)
        loss = _loss(model, [ids[i] for i in chosen], [starts[i] for i in chosen], tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == len(plan) - 1:
            took = time.time() - begun
            print(
                f"  pretraining {step + 1}/{len(plan)}  loss {loss.item():.3f}  {took:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    return model.eval()


def _loss(model: LlamaForCausalLM, rows: list[list[int]], starts: list[int], pad: int) -> Tensor:
    """Mean cross-entropy of the target tokens of right-padded rows; causal attention needs no mask for them."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    column = torch.arange(width)
    first, last = torch.tensor(starts)[:, None], torch.tensor([len(row) for row in rows])[:, None]
    predicts = (column >= first - 1) & (column < last - 1)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[predicts]
    return torch.nn.functional.cross_entropy(model.lm_head(hidden), ids.roll(-1, 1)[predicts])
