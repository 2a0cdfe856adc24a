"""Scores neurons on labelled prompts and targets of any task: the scoring pass as a command and as a function.

    slicetune score code.jsonl news.jsonl law.jsonl --model.path Qwen/Qwen2.5-7B-Instruct
    torchrun --nproc_per_node 8 -m slicetune.engine score …        # the ranks share the samples

A file has a sample a line: a prompt and its target, or the messages of a chat. Each file is a group, or each `group`
that its lines name; selection compares the groups. It writes statistics.safetensors, which `slicetune select` reads. A
pass that was stopped goes on when the same command is given again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..common import distributed
from ..common.errors import UserError
from ..common.files import contents
from ..common.output import Bar
from ..common.settings import differences, fingerprint, of_stage
from ..data import examples as examples_module
from ..data import labelled
from ..data.batching import Example
from ..data.tokenizer import spelling, tokens
from ..models import kinds
from ..models import load as models
from ..models.config import ModelConfig
from ..models.large import partition
from ..models.shapes import ModelShape, from_config
from . import window
from .config import ScoreConfig
from .passes import counts_device
from .passes import score as add_scores
from .progress import Progress
from .share import Share
from .statistics import Statistics

Settle = Callable[[ModelConfig, ScoreConfig, ModelShape, int, int], tuple[ModelConfig, ScoreConfig]]
"""What `auto` settings become: given also the number of groups and the most tokens of a sample."""


def unsettled(
    model: ModelConfig, score: ScoreConfig, shape: ModelShape, groups: int, max_length: int
) -> tuple[ModelConfig, ScoreConfig]:
    """`auto` is as without a GPU. run/forecast/settle.py has what fits one, which this room does not know."""
    return model, score


def score(
    model: str | ModelConfig,
    files: Sequence[str],
    config: ScoreConfig | None = None,
    out: str | Path = "statistics.safetensors",
    max_length: int = 512,
    settle: Settle = unsettled,
) -> Statistics:
    """Score `files` on `model` (a folder, a hub id, or how to load one), on every rank there is, and write `out`.

    Returns what `out` holds, read again on every rank. What `out` has already, of the same model, files and settings,
    is read instead. Raises UserError for files that cannot be used, and for an `out` of something else.
    """
    write(model, files, config or ScoreConfig(), Path(out), max_length, settle)
    return Statistics.load(out)


def write(
    model: str | ModelConfig,
    files: Sequence[str],
    config: ScoreConfig,
    out: Path,
    max_length: int,
    settle: Settle = unsettled,
) -> None:
    """What `score` does but for reading `out`: no rank holds the histograms of all layers."""
    loading = model if isinstance(model, ModelConfig) else ModelConfig(path=model)
    if config.reuse:
        raise UserError("--score.reuse is of runs: here --out is read again if it is of the same files and settings")
    samples = distributed.first_rank_first(lambda: labelled.read(files))
    base = Path(distributed.first_rank_first(lambda: models.snapshot(loading.path)))
    identity: dict[str, Any] = {"model": models.fingerprint(base), "files": contents(files)}
    identity |= {"quantize": loading.quantize} if loading.quantize != "none" else {}
    identity |= {"score": of_stage(config, "score"), "max_length": max_length, "groups": labelled.groups(samples)}
    if out.is_file():
        if rows := differences(Statistics.sums(out).provenance, json.loads(json.dumps(identity))):
            table = "; ".join(f"{key}: {old} → {new}" for key, old, new in rows[:8])
            raise UserError(f"{out} was made with other settings ({table}): use another --out, or delete it")
        distributed.print0(f"{out} is there already")
        return
    tokenizer = models.load_tokenizer(str(base))
    examples, dropped = labelled.encode(tokenizer, samples, max_length)
    for reason, count in sorted(dropped.items()):
        distributed.print0(f"{count} samples dropped, {reason}")
    if not examples:
        raise UserError("no sample is left: raise --max-length")
    for group in identity["groups"]:
        if lost := spelling.lost_targets(tokenizer, (each.target for each in samples if each.group == group)):
            distributed.print0(lost.line(group))
    distributed.print0(examples_module.show(tokenizer, examples[0]))
    shape = from_config(models.config_json(base))
    named = [(each.uid, each.input_ids) for each in examples]
    tokens.check(tokenizer, named, shape.vocab)
    kinds.look_at_lengths(models.config_json(base), named)
    size = shape.parameters * models.model_dtype(loading.dtype, distributed.device()).itemsize
    if loading.quantize != "none" and loading.partition == "on":
        raise UserError(
            f"--model.quantize {loading.quantize}: quantised weights are not cut up: leave --model.partition at auto"
        )
    cut = loading.quantize == "none" and partition.wanted(loading.partition, size)
    held = "partitioned" if cut else "whole"
    loading = replace(loading, partition="on" if cut else "off")
    loading, config = settle(loading, config, shape, len(identity["groups"]), max_length)
    load = lambda: models.load_model(str(base), loading, distributed.device(), held=held)  # noqa: E731
    partial = out.with_name(f"{out.name}.partial")
    share, clear = scored(load, examples, identity["groups"], shape, config, partial, identity, tokenizer.pad_token_id)
    share.save(out, identity)
    clear()
    distributed.first(lambda: shutil.rmtree(partial, ignore_errors=True))


def scored(
    load: Callable[[], nn.Module],
    examples: Sequence[Example],
    groups: Sequence[str],
    shape: ModelShape,
    config: ScoreConfig,
    folder: Path,
    identity: dict[str, Any],
    pad_id: int,
) -> tuple[Share, Callable[[], None]]:
    """The whole pass on this rank's share, all-reduced, with a bar; it goes on from what `folder` has of `identity`.

    Returns the share, whose `save` writes the whole statistics, and what deletes the partial ones: both to be called
    on every rank, in this order.
    """
    rank, world = distributed.rank(), distributed.world()
    where = counts_device(config, distributed.device())
    model = load()
    lowest = window.choose(model, examples, config, pad_id)
    share = Share(list(groups), shape, lowest, where, rank, world)
    key = {"settings": fingerprint(identity), "tokens_per_batch": config.batch_tokens, "lowest_octave": lowest}
    partial = Progress(folder, key, config.save_minutes)
    done = partial.resume(share)
    with Bar("score", len(examples), "sentence") as bar:
        add_scores(
            model,
            examples,
            share,
            config,
            pad_id=pad_id,
            rank=rank,
            world=world,
            progress=bar.add,
            done=done,
            after_batch=lambda done: partial.after_batch(share, done),
        )
    return share, partial.clear


@dataclass
class Arguments:
    """Score neurons on labelled prompts and targets."""

    files: tuple[str, ...]
    """JSON lines of prompt and target, or of messages, with a group, or a file a group."""
    model: ModelConfig = field(default_factory=ModelConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    out: str = "statistics.safetensors"
    """The statistics to write."""
    max_length: int = 512
    """Tokens of a sample; longer ones are counted and dropped."""
