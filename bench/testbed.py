"""A base model in which there is something to learn: taught some domains of real text, and nothing of the others.

    python bench/testbed.py --data DATA --out MODEL            # an hour of two cores
    python bench/testbed.py --data DATA --out MODEL --epochs 1 # quicker, and worse

DATA holds `de-en/<domain>/train.jsonl.gz`. The model reads everyday text, captions, chat, Bible verses and news; of it,
law, medical, subtitles, koran and software it sees no sentence, and its tokenizer none either. Its prompt is `short`.
bench/study.py trains on what was left out, where a method can show what it is worth.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch

from slicetune.engine.data.tiny import pretrain

TAUGHT = ("tatoeba", "captions", "chat", "bible", "news")
SHAPE = pretrain.Size(320, 960, 6, 5, phrases=0, general=0, plain=0, own=0, batch=96, vocabulary=8192)
"""10.6 million parameters."""
LONGEST = 110
"""Tokens of a text that is taught, prompt and target: longer ones cost much and teach little."""
SHORT = 40
"""Tokens of the texts that come first, alone: the model learns from them which word stands for which."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--taught", nargs="+", default=TAUGHT)
    given = parser.parse_args()
    texts = taught(given.data, given.taught)
    tokenizer = pretrain.train_tokenizer(texts, SHAPE.vocabulary)
    rows = [row for row in tokenizer(texts, add_special_tokens=False)["input_ids"] if len(row) <= LONGEST]
    print(f"{len(rows):,} of {len(texts):,} texts, {sum(map(len, rows)):,} tokens an epoch", flush=True)
    torch.set_num_threads(1)  # of each operation; the halves of an update run at once
    model = pretrain.fit(pretrain.new_model(SHAPE, tokenizer).train(), tokenizer, batches(rows, given.epochs))
    model.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)


def taught(data: Path, domains: Sequence[str]) -> list[str]:
    """The training sentences of the domains, in the prompt that the model will know."""
    files = {domain: data / "de-en" / domain / "train.jsonl.gz" for domain in domains}
    return [
        pretrain.chat(domain, pair["de"], pair["en"]) for domain, file in files.items() for pair in pretrain.read(file)
    ]


def batches(rows: list[list[int]], epochs: int, seed: int = 0) -> list[list[list[int]]]:
    """The short rows once in larger batches, then all rows `epochs` times."""
    rng = random.Random(seed)
    plan = pretrain.buckets([row for row in rows if len(row) <= SHORT], 2 * SHAPE.batch, rng)
    for _ in range(epochs):
        plan += pretrain.buckets(rows, SHAPE.batch, rng)
    return plan


if __name__ == "__main__":
    main()
