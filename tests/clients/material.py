"""What the clients read, made with the project's own Python: a loop of somebody's own, and what transformers says.

material.py WORK, where the runs lie. Leaves WORK/own, WORK/attached (the same with the
slices in it), WORK/one_rank and WORK/truth.json:

    base       the base model's folder          prompts    token ids of test sentences
    end        ids of the end token             new        how many tokens are decoded
    tokens     by model, greedy tokens          models     by model, its folder
    ranks      that slicetune says vLLM takes
    lessons    token ids and labels of training sentences
    texts      the same as prompt and completion
    references their translations, as text
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import loops
import torch
from shared import WORK, cut, finish, row
from torch import Tensor, nn

from slicetune.engine.common.checkpoint import masters
from slicetune.engine.common.files import write_json
from slicetune.engine.data import prompts
from slicetune.engine.export import adapter
from slicetune.engine.export.live import chosen_masters as chosen
from slicetune.engine.run.config import read_run
from slicetune.engine.run.job import Job

NEW = 40
EACH = 4
"""Prompts of a domain."""


def main() -> None:
    job = Job(read_run(WORK / "run"))
    known = described(job)
    write_json(WORK / "truth.json", known)
    row("neurons, run", f"{parameters(WORK / 'run')} parameters", True)
    live_of_run()
    own_loop(job.tokenizer)
    adapter.write(WORK / "run" / "delta", str(job.base), WORK / "one_rank", own_ranks=False)
    known["tokens"] = {name: greedy(loops.plain(folder), known) for name, folder in known["models"].items()}
    write_json(WORK / "truth.json", known)
    different = sum(a != b for a, b in zip(known["tokens"]["base"], known["tokens"]["run"], strict=True))
    row("run's translations that are not the base's", f"{different} of {len(known['prompts'])}", different > 0)
    finish("torch", "transformers", "peft")


def described(job: Job) -> dict[str, Any]:
    """All of truth.json but the tokens."""
    wording = prompts.resolve(job.config.data, job.config.seed)
    tests = [pair for pairs in job.tests().values() for pair in pairs[:EACH]]
    whole = [prompts.encode(job.tokenizer, wording, pair) for pair in tests]
    examples = job.examples("train", 40)
    decode = job.tokenizer.decode
    return {
        "base": str(job.base),
        "models": {
            "base": str(job.base),
            **{name: str(WORK / name / "model") for name in ("run", "second", "lora")},
            "own": str(WORK / "own"),
        },
        "ranks": adapter.VLLM_RANKS,
        "end": end_tokens(job.base),
        "new": NEW,
        "prompts": [prompts.encode(job.tokenizer, wording, pair, with_target=False)[0] for pair in tests],
        "references": [decode(ids[start:], skip_special_tokens=True) for ids, start in whole],
        "lessons": [{"ids": e.input_ids, "start": e.target_start} for e in examples],
        "texts": [
            {"prompt": decode(e.input_ids[: e.target_start]), "completion": decode(e.input_ids[e.target_start :])}
            for e in examples
        ],
    }


def end_tokens(base: Path) -> list[int]:
    """Of generation_config.json, else of config.json."""
    found = next(
        value
        for name in ("generation_config.json", "config.json")
        if (base / name).is_file() and (value := json.loads((base / name).read_text()).get("eos_token_id")) is not None
    )
    return found if isinstance(found, list) else [found]


def parameters(run: Path) -> int:
    return json.loads((run / "results.json").read_text())["trainable_parameters"]


@torch.no_grad()
def live_of_run() -> None:
    """The run's model as it was trained, the base with the checkpoint's slices, against its model/."""
    model, _ = loops.attached()
    for name, value in masters(chosen(WORK / "run")).items():
        model.get_parameter(name).copy_(value)
    loops.saved("run: model/ against the trained slices", model, WORK / "run" / "model")


def own_loop(tokenizer: Any) -> None:
    """Plain torch: attach, AdamW, and two ways of saving; the live model's logits afterwards."""
    model, params = loops.attached()
    optimizer = torch.optim.AdamW(params, lr=3e-3, weight_decay=0.0)
    for step in range(20):
        model(**loops.batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(WORK / "attached")
    loops.save(model, WORK / "own")
    for name in ("own", "attached"):
        tokenizer.save_pretrained(WORK / name)
    loops.saved("own loop: the saved folder against the live model", model, WORK / "own")
    loops.saved("own loop: save_pretrained of the attached model", model, WORK / "attached")


@torch.no_grad()
def greedy(model: nn.Module, known: dict[str, Any]) -> list[list[int]]:
    """Each prompt by itself, without padding, until the end token."""
    found = []
    for ids in known["prompts"]:
        asked: Tensor = torch.tensor([ids])
        made = model.generate(
            asked, attention_mask=torch.ones_like(asked), do_sample=False, max_new_tokens=known["new"]
        )
        found.append(cut(made[0, len(ids) :].tolist(), known["end"]))
    return found


if __name__ == "__main__":
    main()
