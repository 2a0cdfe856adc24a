"""Sizes that the benchmarks run at: Llama-3.1-8B's on a GPU, a narrower Llama on a CPU, almost nothing in a smoke run.

SLICETUNE_BENCH=smoke     shrinks every shape, so that tests can see each benchmark run through in seconds
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Literal

import torch

from slicetune.engine.models.shapes import ModelShape, known, llama

SMOKE = os.environ.get("SLICETUNE_BENCH") == "smoke"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if GPU else torch.float32

CPU_MODEL = llama("Llama, hidden 1024", 4, 1024, 3584, 16, 4, 4096)
TINY_MODEL = llama("Llama, hidden 128", 4, 128, 384, 4, 4, 2000, tied=True)
SMOKE_MODEL = llama("Llama, hidden 64", 2, 64, 160, 4, 2, 128)
LLAMA31_8B = known("Llama-3.1-8B")
NEURON_RATIO = 0.01 if not SMOKE else 0.1


Form = Literal["packed", "padded", "equal"]


@dataclass(frozen=True)
class Load:
    """A model and what one forward reads: `sentences` of `length` tokens each, the second half of each predicted."""

    model: ModelShape
    sentences: int
    length: int
    form: Form = "equal"
    """equal: all of one length. padded, packed: of random lengths with that mean, one a row, or all in one row."""

    @property
    def tokens(self) -> int:
        return self.sentences * self.length

    def __str__(self) -> str:
        size = f"{self.model.layers} layers, hidden {self.model.hidden}, intermediate {self.model.intermediate}"
        form = "" if self.form == "equal" else f" on average, {self.form}"
        dtype = str(DTYPE).removeprefix("torch.")
        return f"{size}, {self.tokens:,} tokens ({self.sentences} × {self.length}{form}), {dtype}"


def _pick(gpu: Load, cpu: Load, smoke: int = 3) -> Load:
    return Load(SMOKE_MODEL, smoke, 8) if SMOKE else gpu if GPU else cpu


EIGHT_LAYERS = replace(LLAMA31_8B, layers=8)
"""What full fine-tuning and masked Adam fit with; then every method runs in it."""

STEP = _pick(Load(EIGHT_LAYERS, 64, 128), Load(CPU_MODEL, 5, 96))
"""A training step. On the CPU 5 sentences, the global batch of CANEFT's authors: 8,192 tokens would take 17 times as
long, and `make bench` hours."""

SHORT_STEP = _pick(Load(EIGHT_LAYERS, 5, 96), Load(CPU_MODEL, 1, 96), 2)
"""A small one: the authors' 5 sentences on a GPU, one sentence (a rank's share of them) on a CPU."""

WHOLE_STEP = _pick(Load(LLAMA31_8B, 64, 128), Load(CPU_MODEL, 5, 96), 4)
"""All layers of the 8B: the methods that fit."""

WHOLE_SHORT_STEP = _pick(Load(LLAMA31_8B, 5, 96), Load(CPU_MODEL, 5, 96), 3)
"""The authors' 5 sentences: a step so short that the host's launches may bound it."""

SMALL_GPU_STEP = _pick(Load(LLAMA31_8B, 16, 128), Load(CPU_MODEL, 5, 96))
"""The 8B on a card of 24 GB, with activation checkpointing."""

SCORE = _pick(Load(EIGHT_LAYERS, 512, 32), Load(CPU_MODEL, 192, 8))
"""Many short sentences to score (`sentences` of them in all); on a CPU of a subtitle's length."""

SCORE_LONGER = Load(SMOKE_MODEL, 2, 10) if SMOKE else _pick(Load(EIGHT_LAYERS, 256, 128), Load(CPU_MODEL, 96, 24))

SCORE_TINY = Load(SMOKE_MODEL, 4, 9) if SMOKE else Load(TINY_MODEL, 512, 24)
"""The same on a model of the size that `make quickstart` scores."""

SMALL_GPU_SCORE = _pick(Load(LLAMA31_8B, 64, 32), Load(CPU_MODEL, 32, 12))

FFN = _pick(Load(LLAMA31_8B, 64, 128), Load(CPU_MODEL, 16, 64))
"""One layer's FFN: microbenchmarks of kernels."""

SELECTION_LAYERS = 1 if SMOKE else LLAMA31_8B.layers
SELECTION = replace(SMOKE_MODEL if SMOKE else LLAMA31_8B, layers=SELECTION_LAYERS)
SELECTION_SAMPLES = 1_000 if SMOKE else 10_000
"""Sentences a domain; four domains."""
