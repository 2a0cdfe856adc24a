"""lm-evaluation-harness on model/: a local task of two choices and one of generation, without the hub."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import sacrebleu
import torch
from shared import WORK, finish, row, truth
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = WORK / "lm_eval"
CHOICE = """
task: clients_choice
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
"""
GENERATE = """
task: clients_generate
output_type: generate_until
doc_to_target: reference
generation_kwargs: {do_sample: false, max_gen_toks: %d, until: []}
metric_list: [{metric: bleu}]
"""
BOTH = """
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
doc_to_text: prompt
target_delimiter: ""
"""


def documents(tokenizer: Any) -> list[dict[str, Any]]:
    """A prompt with its reference, and that of the next sentence as the wrong choice."""
    known = truth()
    references = known["references"]
    texts = [tokenizer.decode(ids) for ids in known["prompts"]]
    assert [tokenizer.encode(text, add_special_tokens=False) for text in texts] == known["prompts"]
    others = references[1:] + references[:1]
    return [
        {"prompt": text, "reference": right, "choices": [right, wrong], "answer": 0}
        for text, right, wrong in zip(texts, references, others, strict=True)
    ]


def harness(model: str, docs: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """The command's scores and its samples, by task."""
    FOLDER.mkdir(exist_ok=True)
    data = FOLDER / "test.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, task in (("choice", CHOICE), ("generate", GENERATE % truth()["new"])):
        (FOLDER / f"{name}.yaml").write_text(task + BOTH % data)
    words = ["--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--include_path", str(FOLDER)]
    words += ["--tasks", "clients_choice,clients_generate", "--device", "cpu", "--batch_size", "4"]
    words += ["--output_path", str(FOLDER / "out"), "--log_samples"]
    subprocess.run([Path(sys.executable).with_name("lm_eval"), *words], check=True)
    newest = lambda pattern: max((FOLDER / "out").rglob(pattern), key=lambda p: p.stat().st_mtime)  # noqa: E731
    scores = json.loads(newest("results_*.json").read_text())["results"]
    read = lambda path: [json.loads(line) for line in path.read_text().splitlines()]  # noqa: E731
    return scores, {name: read(newest(f"samples_{name}_*.jsonl")) for name in ("clients_choice", "clients_generate")}


@torch.no_grad()
def loglikelihood(model: nn.Module, tokenizer: Any, prompt: str, choice: str) -> float:
    """The sum of the choice's log-probabilities after the prompt."""
    head = tokenizer.encode(prompt, add_special_tokens=False)
    ids = tokenizer.encode(prompt + choice, add_special_tokens=False)
    logs = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return sum(float(logs[place - 1, ids[place]]) for place in range(len(head), len(ids)))


def main() -> None:
    folder = truth()["models"]["run"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    docs = documents(tokenizer)
    scores, samples = harness(folder, docs)
    wanted = [[loglikelihood(model, tokenizer, doc["prompt"], choice) for choice in doc["choices"]] for doc in docs]
    logs = {s["doc_id"]: [float(answer[0]) for answer in s["filtered_resps"]] for s in samples["clients_choice"]}
    largest = max(abs(a - b) for i, pair in enumerate(wanted) for a, b in zip(pair, logs[i], strict=True))
    right = sum(pair[0] > pair[1] for pair in wanted) / len(wanted)
    accuracy = scores["clients_choice"]["acc,none"]
    what = f"loglikelihood of {2 * len(docs)} choices"
    row(what, f"differ by at most {largest:.2g}; accuracy {accuracy} and {right}", largest < 1e-3 and accuracy == right)
    expected = [tokenizer.decode(ids, skip_special_tokens=True) for ids in truth()["tokens"]["run"]]
    texts = {s["doc_id"]: s["filtered_resps"][0] for s in samples["clients_generate"]}
    same = sum(texts[i] == text for i, text in enumerate(expected))
    direct = sacrebleu.corpus_bleu(expected, [[doc["reference"] for doc in docs]]).score
    score = scores["clients_generate"]["bleu,none"]
    found = f"{same} of {len(docs)} texts equal; BLEU {score} and {direct}"
    row("generate_until", found, same == len(docs) and score == direct)
    finish("lm_eval", "transformers", "torch")


if __name__ == "__main__":
    main()
