"""For loops of somebody's own: the base model with the run's neurons attached, sentences, and logits to compare.

Needs torch, transformers and slicetune. The live model is the one in the process that has trained it.
"""

from __future__ import annotations

import copy
import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
from shared import WORK, row, truth, zero_row
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from slicetune.engine import ffn, slices
from slicetune.engine.slices.neurons import NeuronSet

BATCH = 8
known = cache(truth)


def plain(folder: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A folder as any user of transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def attached(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[nn.Parameter]]:
    """The base with the run's neurons, and what is trained."""
    model = plain(known()["base"], dtype)
    return model, ffn.attach(model, NeuronSet.load(WORK / "run" / "neurons.safetensors"))


def optimizer(kind: str, params: list[nn.Parameter], rate: float = 3e-3) -> torch.optim.Optimizer:
    """`slices` is slicetune's, `torch` is torch's AdamW."""
    made = slices.SparseColumnAdamW if kind == "slices" else torch.optim.AdamW
    return made(params, lr=rate, weight_decay=0.0)


class Sentences(torch.utils.data.Dataset):
    """Training sentences as token ids and labels."""

    def __init__(self, count: int = 64) -> None:
        lessons = known()["lessons"]
        self.rows = random.Random(0).sample(lessons, min(count, len(lessons)))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        ids, start = self.rows[i]["ids"], self.rows[i]["start"]
        return {"input_ids": ids, "labels": [-100] * start + ids[start:]}


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Padded on the right."""
    width = max(len(row["input_ids"]) for row in rows)
    fill = lambda values, value: values + [value] * (width - len(values))  # noqa: E731
    return {
        "input_ids": torch.tensor([fill(row["input_ids"], 0) for row in rows]),
        "labels": torch.tensor([fill(row["labels"], -100) for row in rows]),
        "attention_mask": torch.tensor([fill([1] * len(row["input_ids"]), 0) for row in rows]),
    }


def batch(step: int) -> dict[str, Tensor]:
    """The sentences of an update."""
    sentences = Sentences()
    first = step * BATCH
    return collate([sentences[i % len(sentences)] for i in range(first, first + BATCH)])


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Of the same sentences each time, in float32."""
    was = model.training
    model.eval()
    sentences = Sentences()
    ids = collate([sentences[i] for i in range(BATCH)])
    found = model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).logits.float()
    model.train(was)
    return found


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference."""
    return float((a - b).abs().max())


def compared(what: str, live: Tensor, other: nn.Module, note: str = "", allowed: float = 0.0) -> None:
    """A row: the logits of another model against the live one's, beside how far those are from the base's."""
    dtype = next(other.parameters()).dtype
    moved = distance(live, logits(plain(known()["base"], dtype)))
    zero_row(what, distance(live, logits(other)), moved, allowed, note)


def saved(what: str, model: nn.Module, folder: str | Path) -> None:
    """A row: a saved Hugging Face folder against the live model.

    Saved before this is called: the live model's forward may write what a step has left unwritten. In bfloat16 an
    attached FFN, which is one function, rounds at other places than three layers: there the live model is merged first.
    """
    dtype = next(model.parameters()).dtype
    if dtype != torch.float32:
        model = slices.merge(copy.deepcopy(model))
    again, about = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    unknown, missing = len(about["unexpected_keys"]), len(about["missing_keys"])
    compared(what, logits(model), again.eval(), f"; {unknown} unknown keys, {missing} missing")


def save(model: nn.Module, folder: str | Path) -> None:
    """A plain Hugging Face folder of the live model."""
    ffn.save(model, folder)


def state(params: list[nn.Parameter]) -> list[Tensor]:
    """A copy of what is trained."""
    return [p.detach().clone() for p in params]


def state_of(model: nn.Module) -> list[Tensor]:
    """A copy of what a model trains."""
    return state([p for p in model.parameters() if p.requires_grad])


def same_row(what: str, a: list[Tensor], b: list[Tensor]) -> None:
    """A row: two trained states, which are to be equal bit for bit."""
    largest = max(distance(x.float(), y.float()) for x, y in zip(a, b, strict=True))
    row(what, f"largest difference of trained weights {largest:.3g}", largest == 0)


def settings(**values: Any) -> dict[str, Any]:
    """A trainer's usual settings, with these in their place."""
    return {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "seed": 0} | values
