"""The loops of engine/slices/README.md, taken from the page and run: each saves a plain model that has been trained."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
import trl
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from slicetune.engine import ffn, slices

PAGE = Path(ffn.__file__).parent / "slices" / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
LOOPS = ("model.train()", "transformers import DataColl", "trl import", "accelerate import", "import lightning")
TEXTS = ["ein Haus", "zwei Häuser", "drei Wege", "ein Weg", "kein Weg", "viele Wege", "ein Baum", "zwei Bäume"]


def block(start: str) -> str:
    """The page's block that begins so, but for `from`."""
    (found,) = (block for block in BLOCKS if block.removeprefix("from ").startswith(start))
    return found


@pytest.fixture
def names(tmp_path, monkeypatch) -> dict[str, Any]:
    """What the page takes as given: a model with a neuron set attached, its tokenizer, text in every form."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(trl, "SFTConfig", partial(trl.SFTConfig, use_cpu=True, bf16=False))  # TRL expects a GPU
    toys.model_of_bytes("llama").save_pretrained("model")
    toys.bytes_tokenizer(chat=True).save_pretrained("model")
    toys.neurons().save("neurons.safetensors")
    tokenizer = AutoTokenizer.from_pretrained("model")
    batch = [tokenizer([text], return_tensors="pt") for text in TEXTS]
    found = {
        "model": AutoModelForCausalLM.from_pretrained("model"),
        "tokenizer": tokenizer,
        "batches": DataLoader([{k: v[0] for k, v in (one | {"labels": one["input_ids"]}).items()} for one in batch]),
        "tokens": [{"input_ids": one["input_ids"][0]} for one in batch],
        "conversations": Dataset.from_list([{"prompt": "Sag: ", "completion": text} for text in TEXTS]),
    }
    exec(block("slicetune.engine import ffn\n"), found)
    return found


@pytest.mark.parametrize("start", LOOPS)
def test_a_loop_of_the_page_saves_what_it_trained(start, names):
    exec(block(start), names)
    loaded, base = (AutoModelForCausalLM.from_pretrained(folder) for folder in ("trained", "model"))
    live = slices.merge(names["model"]).state_dict()
    changed = {}
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, live[name]), name
        rows = (weight != base.state_dict()[name]).reshape(len(weight), -1).any(1).nonzero().flatten()
        changed |= {name: rows.tolist()} if len(rows) else {}
    chosen = {
        f"model.layers.{layer}.mlp.{part}_proj.weight": index.tolist()
        for (layer, part, _), index in toys.neurons().slices.items()
    }
    assert changed == chosen
    assert not re.search(r"\b(rows|columns)\b", str(list(live)))


def test_every_block_is_short_and_run_here_or_elsewhere():
    """The sharded ones need ranks: test_saved.py has them; the first, second and last are of test_pages.py.

    The quantised base's are calls of test_quantised_slices.py.
    """
    assert all(len(block.splitlines()) <= 18 for block in BLOCKS)
    assert len(BLOCKS) == len(LOOPS) + 6
