"""What the two ranks of rank_pool.py do with their shares of a scoring pass."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import toys
from torch import nn
from transformers import LlamaForCausalLM

from slicetune.engine.common import checkpoint, distributed, sealed
from slicetune.engine.common.errors import UserError
from slicetune.engine.methods.landermt.detect import detect, prompt_only
from slicetune.engine.methods.landermt.detection import Detection
from slicetune.engine.models.config import ModelConfig
from slicetune.engine.models.load import load_model
from slicetune.engine.models.shapes import from_config
from slicetune.engine.scoring.config import ScoreConfig
from slicetune.engine.scoring.passes import score
from slicetune.engine.scoring.progress import Progress
from slicetune.engine.scoring.share import Share

GROUPS = ["a", "b"]
CONFIG = ScoreConfig(tokens_per_batch=60)
SENTENCES = 24
"""They make an odd number of batches."""


def three_layers() -> LlamaForCausalLM:
    """One more layer than two ranks can share evenly."""
    config = toys.model().config
    config.num_hidden_layers = 3
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def empty(model: LlamaForCausalLM) -> Share:
    return Share(GROUPS, from_config(model.config), -40, "cpu", distributed.rank(), distributed.world())


def held(share: Share) -> dict[str, torch.Tensor]:
    """Everything that a rank has of the statistics."""
    return {f"histogram.{p}": counts for p, counts in share.histogram.items()} | share._small()


def score_share(model: LlamaForCausalLM, share: Share, progress: Progress | None = None, done: int = 0) -> None:
    ranks = {"rank": distributed.rank(), "world": distributed.world()}
    after = (lambda done: progress.after_batch(share, done)) if progress else (lambda done: None)
    score(model, toys.examples(SENTENCES), share, CONFIG, **ranks, done=done, after_batch=after)


def share_toys(out: str) -> tuple[list[int], dict[str, torch.Tensor]]:
    """Score, save the whole; the layers counted here and what this rank has."""
    model = three_layers()
    share = empty(model)
    score_share(model, share)
    share.save(Path(out) / "statistics.safetensors", {"toy": 1})
    return list(share.here), held(share)


def scored_until(out: str, saves: int) -> tuple[str, dict[str, torch.Tensor]]:
    """A resumable pass in which rank 1's disk is full after so many saves (0: never); how it ended."""
    model = three_layers()
    share, progress, written = empty(model), Progress(Path(out), {"toy": 1}, minutes=0.0), []
    done = progress.resume(share)

    def write(*args: Any) -> None:
        written.append(args)
        if distributed.rank() == 1 and saves and len(written) > saves:
            raise UserError("the disk of rank 1 is full")
        real(*args)

    real = checkpoint.write
    with mock.patch.object(checkpoint, "write", write):
        try:
            score_share(model, share, progress, done)
        except UserError as error:
            return str(error), {}
    return f"resumed at {done}", held(share)


def save_on_a_full_disk(out: str) -> str:
    """The first rank cannot write the whole: what each rank's save raises, and nobody is left waiting."""
    share, real, written = empty(three_layers()), sealed._bytes, []

    def full(*args: Any) -> memoryview:
        written.append(args)
        if len(written) > 14:  # within the counts
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    try:
        with mock.patch.object(sealed, "_bytes", full):
            share.save(Path(out) / "statistics.safetensors")
    except OSError as error:
        return str(error)
    finally:
        distributed.barrier()
    return ""


def run_together(folder: str) -> tuple[list[int], dict[str, torch.Tensor]]:
    """Score, then detect, odd numbers of batches: how often the model ran on this rank, and what was counted.

    Of `folder`'s model in parts, or, where that is empty, of the same model whole.
    """
    share = empty(model := _three_layers_of(folder))
    runs = [_counted(model)]
    score_share(model, share)
    found = Detection(("b-a", "a-b"), 3, toys.INTERMEDIATE, toys.HIDDEN)
    runs.append(_counted(model := _three_layers_of(folder)))
    prompts = [prompt_only(example) for example in toys.examples(SENTENCES)]
    sentences = [replace(example, target_start=1) for example in toys.examples(SENTENCES, seed=1)]
    detect(model, prompts, sentences, found, CONFIG, rank=distributed.rank(), world=distributed.world())
    return [len(each) for each in runs], held(share) | found._tensors()


def _three_layers_of(folder: str) -> nn.Module:
    return load_model(folder, ModelConfig(), distributed.device(), held="partitioned") if folder else three_layers()


def _counted(model: nn.Module) -> list[int]:
    """Grows by one with every forward of the model."""
    runs: list[int] = []
    model.model.register_forward_pre_hook(lambda *_: runs.append(1))
    return runs
