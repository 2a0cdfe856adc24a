"""Sample translations of the embedded models, and the BLEU of greedy decoding."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..data import corpus, prompts
from ..data.config import DataConfig
from ..data.tiny import corpus_dir, model_dir, pretrain
from ..data.tiny.grammar import GENERAL
from . import bleu, translation


def show() -> None:
    """Make corpus and both models; print a few translations and the BLEU of greedy decoding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"corpus  {corpus_dir()}")
    for size in pretrain.SIZES:
        folder = model_dir(size)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        weights = sum(weight.numel() for weight in model.parameters())
        print(f"model   {folder}: {weights:,} parameters")
        _show(model, AutoTokenizer.from_pretrained(folder), 0 if size == "test" else 2)


def _show(model: nn.Module, tokenizer: Any, samples: int) -> None:
    data = DataConfig(prompt="short")
    for domain in (*data.domains, GENERAL):
        pairs = corpus.load_domain(data, domain, "test")
        prompt = prompts.resolve(data)
        part = translation.translate(model, tokenizer, prompt, pairs, batch_size=50, max_new_tokens=64)
        lines = [line.text for line in translation.gather(part)]
        scores = bleu.score_domain(lines, [pair.target for pair in pairs], "en")
        print(f"  {domain:10} BLEU {scores['bleu']:5.1f}")
        for pair, line in list(zip(pairs, lines, strict=True))[:samples]:
            print(f"    {pair.source}\n      model      {line}\n      reference  {pair.target}")
