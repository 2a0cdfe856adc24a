"""Tokenizer and small Llama of the embedded default, trained from nothing on the generated corpus.

The mixture teaches the words of every domain, but prefers general ones, so that the model translates passably and can
be adapted to domains by few neurons. Two CPU threads, float32, one seed: the same bits on the same machine.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import random
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import languages, prompts
from . import corpus
from .grammar import GENERAL, Text
from .lexicon import DOMAINS

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


SPECIAL = ("<|bos|>", "<|eot|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """Shape of a model and what it is pretrained on."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    phrases: int  # noun phrases, which come first
    general: int  # sentences of the general text
    plain: int  # sentences of each domain, in general words
    own: int  # sentences of each domain's train split, in its own words
    batch: int = 32  # sentences of one update
    vocabulary: int = 2000


SIZES = {
    "tiny": Size(128, 384, 4, 4, phrases=3000, general=9000, plain=1000, own=1000),
    "test": Size(32, 96, 2, 2, phrases=640, general=1600, plain=64, own=64),
}


def build(folder: Path, out: Path, size: str) -> None:
    """Train the tokenizer and the model of `size` on the corpus folder and save both to `out`."""
    shape = SIZES[size]
    lessons = [chat(GENERAL, *pair) for pair in corpus.phrases(shape.phrases, seed=1)]
    train(lessons, [chat(domain, *pair) for domain, pair in mixture(folder, shape)], out, shape)


def train(lessons: list[str], texts: list[str], out: Path, shape: Size) -> None:
    """A tokenizer of the texts, and a model that reads the lessons and then the texts; both are saved to `out`."""
    tokenizer = train_tokenizer(texts, shape.vocabulary)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of each operation; the halves of an update run at once
    try:
        model = pretrain(lessons, texts, tokenizer, shape)
    finally:
        torch.set_num_threads(threads)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def chat(domain: str, source: str, target: str) -> str:
    """A sentence in the `short` prompt and this tokenizer's chat template."""
    named = languages.DOMAINS.get(domain, domain)
    system = prompts.SYSTEMS["short"].format(src="German", tgt="English", domain=named)
    return f"<|bos|><|system|>{system}<|user|>German: {source}<|assistant|>English: {target}<|eot|>"


def mixture(folder: Path, size: Size, seed: int = 1) -> Iterator[tuple[str, Text]]:
    """The pretraining sentences, with the domain that their prompt names.

    General sentences, and of each domain two kinds under one prompt: the first of its train split in the domain's own
    words, and more of them in general words. So the model knows both registers and by itself prefers the general one;
    what adapts it to a domain is small. No text has the source of a dev or test sentence.
    """
    held_out = {pair["de"] for file in sorted((folder / corpus.PAIR).glob("*/[dt]e*.jsonl.gz")) for pair in read(file)}
    for domain in (*DOMAINS, GENERAL):
        general = (pair for pair in corpus.sentences(domain, seed, GENERAL) if pair.de not in held_out)
        count = size.general if domain == GENERAL else size.plain
        yield from ((domain, pair) for pair in itertools.islice(general, count))
        if domain != GENERAL:
            own = read(folder / corpus.PAIR / domain / "train.jsonl.gz")[: size.own]
            yield from ((domain, Text(pair["de"], pair["en"])) for pair in own)


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
    turns = re.compile("|".join(map(re.escape, SPECIAL)))
    tokenizer.train_from_iterator((turn for text in texts for turn in turns.split(text)), trainer)
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


def new_model(size: Size, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """A seeded Llama with tied embeddings, as `pretrain` starts from."""
    from transformers import LlamaConfig, LlamaForCausalLM

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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config.do_sample = False
    return model


def buckets(rows: list[list[int]], size: int, rng: random.Random) -> list[list[list[int]]]:
    """Batches of rows of similar length, in random order."""
    order = sorted(rows, key=lambda row: (len(row), rng.random()))
    out = [order[start : start + size] for start in range(0, len(order), size)]
    rng.shuffle(out)
    return out


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: warm-up over the first twentieth, then a cosine to zero."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def pretrain(lessons: list[str], texts: list[str], tokenizer: PreTrainedTokenizerFast, size: Size) -> LlamaForCausalLM:
    """Train on the English side of the lessons, then of the texts, each once; progress goes to stderr."""
    rng = random.Random(0)
    short, long = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (lessons, texts))
    plan = buckets(short, 2 * size.batch, rng) + buckets(long, size.batch, rng)
    return fit(new_model(size, tokenizer).train(), tokenizer, plan)


def fit(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, plan: list[list[list[int]]]) -> LlamaForCausalLM:
    """Train on batches of token rows, an update each, from `<|assistant|>` on; progress goes to stderr."""
    answer = tokenizer.convert_tokens_to_ids("<|assistant|>")
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim == 1 or "embed" in name]
    optimizers = [Muon(matrices, lr=1e-2), torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: schedule(step, len(plan))) for o in optimizers]
    begun = time.monotonic()
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for step, rows in enumerate(plan):
            loss = _backward(pool, model, rows, answer, tokenizer.pad_token_id)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for each in (*optimizers, *schedules):
                each.step()
            if step % 100 == 99 or step == len(plan) - 1:
                took = time.monotonic() - begun
                say = f"  pretraining: step {step + 1} of {len(plan)}, loss {loss:.2f}, {took:.0f} s"
                print(say, file=sys.stderr, flush=True)
    return model.eval()


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024): it learns to align source and target in far fewer steps than Adam.

    In float32: torch.optim.Muon computes in bfloat16, which is slow on most CPUs, and may differ between them.
    """

    def __init__(self, parameters: list[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                by_shape.setdefault(weight.shape, []).append(weight)
            for (rows, columns), weights in by_shape.items():
                update = orthogonal(torch.stack([self._direction(weight, group["momentum"]) for weight in weights]))
                for weight, change in zip(weights, update, strict=True):
                    weight.sub_(change, alpha=group["lr"] * max(1.0, rows / columns) ** 0.5)

    def _direction(self, weight: Tensor, momentum: float) -> Tensor:
        """Nesterov's: the gradient leant towards its running mean."""
        state = self.state[weight]
        if "mean" not in state:
            state["mean"] = torch.zeros_like(weight)
        mean = state["mean"].lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(mean, momentum)


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """[n, a, b]: each matrix with its singular values brought near 1 (0.7 to 1.2), by Newton–Schulz iterations."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


def _backward(pool: ThreadPoolExecutor, model: LlamaForCausalLM, rows: list[list[int]], answer: int, pad: int) -> float:
    """Set the gradients of a batch, one half of it on each thread, and return its loss.

    Threads that meet once an update lose far less on a busy machine than ones that share every small operation, and
    the sums' order does not depend on how many cores there are.
    """
    weights = list(model.parameters())

    def half(part: list[list[int]]) -> tuple[float, tuple[Tensor, ...]]:
        loss = _loss(model, part, [row.index(answer) + 1 for row in part], pad)
        return loss.item(), torch.autograd.grad(loss, weights)

    parts = list(pool.map(half, [part for part in (rows[::2], rows[1::2]) if part]))
    for weight, *gradients in zip(weights, *(gradients for _, gradients in parts), strict=True):
        weight.grad = torch.stack(gradients).mean(0)
    return sum(loss for loss, _ in parts) / len(parts)


def _loss(model: LlamaForCausalLM, rows: list[list[int]], starts: list[int], pad: int) -> Tensor:
    """Mean cross-entropy of the target tokens of right-padded rows; causal attention needs no mask for them."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    column = torch.arange(width)
    first, last = torch.tensor(starts)[:, None], torch.tensor([len(row) for row in rows])[:, None]
    predicts = (column >= first - 1) & (column < last - 1)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[predicts]
    return torch.nn.functional.cross_entropy(model.lm_head(hidden), ids.roll(-1, 1)[predicts])
