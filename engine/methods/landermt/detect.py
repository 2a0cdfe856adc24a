"""The detection pass of LANDeRMT: activations on translation prompts, awareness on monolingual sentences.

Eq. 1 needs forward passes over each pair's prompts, without their translations: mean h and mean FFN output of every
layer. Eq. 4 needs a backward over each language's bare sentences: |∂L/∂h·h| falls out of the FFN's backward (fused.py,
kernels/) as CANEFT's scores do, with no weight gradient and no per-sample storage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ....kernels.common.fold import Segments
from ...common.errors import UserError
from ...data.batching import Batch, Example, batches_by_tokens
from ...models.attention import inputs_of
from ...models.large.partition import gathering, is_partitioned
from ...models.packing import packs_long_rows
from ...models.sites import find_ffns
from ...scoring.config import ScoreConfig
from ...scoring.passes import Turns, backpropagate, batch_of, tapped, walk
from ...slices.fused import FusedFFN
from .detection import Detection


class AwarenessTap:
    """Hangs in every FFN while sentences are scored; turns sums of h·dh into awareness and adds it to `detection`."""

    def __init__(self, detection: Detection, config: ScoreConfig) -> None:
        self.detection, self.reduce = detection, config.token_reduce
        self.anchor = torch.zeros((), requires_grad=True)
        self.segments: Segments
        self.lengths: Tensor
        self.languages: Tensor
        self.recorded = True

    def begin(self, batch: Batch, recorded: bool) -> None:
        """Take the next batch of sentences; its groups are languages. A filler is not recorded."""
        self.recorded = recorded
        self.segments, self.languages = Segments(batch.ranges, batch.groups.device), batch.groups
        self.lengths = self.segments.lengths()
        if recorded:
            self.detection.add_sentences(batch.groups)

    def record(self, layer: int, scores: dict[str, Tensor], unit: Tensor, active: Tensor, activation: Tensor) -> None:
        """Per-sample sums of one layer; `unit` [samples, I] is that of h·dh."""
        if not self.recorded:
            return
        awareness = unit / self.lengths[:, None] if self.reduce == "mean_abs" else unit.abs()
        self.detection.add_awareness(layer, awareness, self.languages)


def prompt_only(example: Example) -> Example:
    """An example without its target: what Eq. 1 looks at. A prompt has two tokens at least."""
    start = example.target_start
    return replace(example, input_ids=example.input_ids[:start], target_start=start - 1)


def detect(
    model: nn.Module,
    prompts: Sequence[Example],
    sentences: Sequence[Example],
    detection: Detection,
    config: ScoreConfig,
    *,
    pad_id: int = 0,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int], None] = lambda samples: None,
    done: int = 0,
    after_batch: Callable[[int], None] = lambda done: None,
) -> None:
    """Count prompts (their group is the pair) and sentences (the language) on `model`; all-reduced at the end.

    `prompts` end where the translation begins (`prompt_only`); all tokens of both count. Every rank takes every
    world-th batch, as `score` does; the first `done` batches, of prompts and then of sentences, are in the detections
    of all ranks already. Raises UserError for --score.tokens target, and when a loss is not finite.
    """
    if config.tokens != "all":
        raise UserError(f"--score.tokens {config.tokens}: awareness is of a sentence without a prompt: write all")
    model.requires_grad_(False)
    device, packed = next(model.parameters()).device, packs_long_rows(model)
    forward = list(batches_by_tokens(prompts, config.batch_tokens, packed))
    backward = list(batches_by_tokens(sentences, config.batch_tokens, packed))
    turns, first = Turns(rank, world, is_partitioned(model), progress), len(forward)

    with observed(model, detection) as begin:

        def look(indices: list[int], recorded: bool) -> None:
            batch = batch_of([prompts[i] for i in indices], packed, pad_id).to(device)
            begin(batch, recorded)
            with torch.no_grad():
                model.base_model(**inputs_of(model, batch))

        walk(forward, look, turns, done=min(done, first), after_batch=after_batch)
    tap = AwarenessTap(detection, config)

    def learn(indices: list[int], recorded: bool) -> None:
        batch = batch_of([sentences[i] for i in indices], packed, pad_id).to(device)
        tap.begin(batch, recorded)
        backpropagate(model, batch, config.loss)

    with tapped(model, tap):
        walk(backward, learn, turns, done=max(0, done - first), after_batch=lambda n: after_batch(first + n))
    detection.all_reduce()


@contextmanager
def observed(model: nn.Module, detection: Detection) -> Iterator[Callable[[Batch, bool], None]]:
    """Hooks on every FFN's last projection, whose input is h: adds its and its output's means over each prompt.

    Yields what to call before a batch's forward, and whether that is recorded. The FFNs are the model's own.
    """
    ranges: list[tuple[int, int]] = []
    groups: list[Tensor] = []  # empty where nothing is recorded

    def begin(batch: Batch, recorded: bool) -> None:
        ranges[:], groups[:] = batch.ranges, [batch.groups] if recorded else []
        if recorded:
            detection.add_prompts(batch.groups)

    def means(x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        return torch.stack([flat[begin:end].float().mean(0) for begin, end in ranges])

    def hook(layer: int) -> Callable[..., None]:
        def add(module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> None:
            for own in groups:
                detection.add_activations(layer, means(inputs[0]), means(output), own)

        return add

    handles = []
    try:
        for site in find_ffns(model):
            assert not isinstance(site.module, FusedFFN), "a fused FFN does not call its projections"
            last = getattr(site.module, list(site.projections.values())[-1])
            handles.append(last.register_forward_hook(hook(site.layer)))
        with gathering(model):
            yield begin
    finally:
        for handle in handles:
            handle.remove()
