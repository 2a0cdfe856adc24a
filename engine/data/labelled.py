"""Labelled prompts and targets of any task: JSON lines → examples to score neurons on.

    {"prompt": "def add(a, b):", "target": " return a + b", "group": "code"}
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}], "group": "maths"}

Without `group` the file's name is the group: code.jsonl, news.jsonl.gz. A prompt and a target are read as one text,
after the tokenizer's BOS and before its end token (white space at the prompt's end is predicted with the target);
`messages` take its chat template, the last one is the target.
Next: scoring/score.py.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from .batching import Example
from .tokenizer import tokens


@dataclass
class Sample:
    """One line of a file."""

    prompt: str | list[dict[str, str]]
    """A text, or the messages before the target."""
    target: str
    group: str
    uid: str
    """`<file>:<line>`."""


def read(files: Sequence[str]) -> list[Sample]:
    """All samples, in the files' order. Raises UserError, naming file and line, for one that cannot be used."""
    of = {file: list(_samples(Path(file).expanduser())) for file in files}
    if empty := [file for file, found in of.items() if not found]:
        raise UserError(f"{' '.join(empty)}: no sample in it: leave the file out, or fill it")
    samples = [sample for found in of.values() for sample in found]
    if not samples:
        raise UserError(f"{' '.join(files) or 'no file'}: no sample: name files of lines with prompt, target and group")
    return samples


def groups(samples: Sequence[Sample]) -> list[str]:
    """Their groups, in the order in which they come first."""
    return list(dict.fromkeys(sample.group for sample in samples))


def encode(tokenizer: Any, samples: Sequence[Sample], max_length: int) -> tuple[list[Example], Counter[str]]:
    """Tokenise; samples are dropped whole, never cut: "<group>: <reason>" → how many.

    Raises UserError for messages where the tokenizer has no chat template.
    """
    number = {name: i for i, name in enumerate(groups(samples))}
    kept, dropped = [], Counter[str]()
    for sample in samples:
        if isinstance(sample.prompt, str):
            ids, start = tokens.plain(tokenizer, sample.prompt, sample.target)
        elif tokenizer.chat_template:
            ids, start = tokens.chat(tokenizer, sample.prompt, sample.target)
        else:
            raise UserError(f"{sample.uid}: messages, but the tokenizer has no chat template: write prompt and target")
        if len(ids) > max_length:
            dropped[f"{sample.group}: longer than {max_length} tokens"] += 1
        elif not 0 < start < len(ids):
            dropped[f"{sample.group}: nothing before the target, or no target"] += 1
        else:
            kept.append(Example(ids, start, number[sample.group], sample.uid))
    return kept, dropped


def _samples(path: Path) -> Iterator[Sample]:
    usual = path.name.removesuffix(".gz").rpartition(".")[0] or path.name
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                raise UserError(f"{where}: not JSON: write one record a line") from None
            if not isinstance(record, dict):
                raise UserError(f"{where}: not a JSON object: write prompt and target, or messages")
            yield _sample(record, usual, where)


def _sample(record: dict[str, Any], usual: str, where: str) -> Sample:
    prompt, target, group = record.get("prompt"), record.get("target"), record.get("group", usual)
    if "messages" in record:
        prompt, target = _messages(record["messages"], where)
    for name, value in (("prompt", prompt), ("target", target), ("group", group)):
        if not (isinstance(value, str) or (name == "prompt" and isinstance(value, list))):
            raise UserError(f"{where}: {name!r} is no text: write prompt and target (and group), or messages")
    if not target or not group:
        raise UserError(f"{where}: an empty {'target' if not target else 'group'}")
    return Sample(prompt, target, group, where)


def _messages(messages: Any, where: str) -> tuple[list[dict[str, str]], str]:
    """What comes before the answer, and the answer."""
    sound = isinstance(messages, list) and all(
        isinstance(each, dict) and isinstance(each.get("role"), str) and isinstance(each.get("content"), str)
        for each in messages
    )
    if not sound or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise UserError(f"{where}: messages must be a list of role and content that ends with an assistant's")
    turns = [{"role": each["role"], "content": each["content"]} for each in messages]
    return turns[:-1], turns[-1]["content"]


def _lines(path: Path) -> Iterator[str]:
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig") as file:
            yield from file
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}): name a UTF-8 file of JSON lines") from None
