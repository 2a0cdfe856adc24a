"""The dry run's tables of memory: what a GPU holds while scoring and training, and what fits.

`gpu_memory` is one GPU's in bytes, None where it is not known. The arithmetic is in memory.py. Next: estimate.py.
"""

from __future__ import annotations

from dataclasses import replace

from ...methods.counts import Trainable
from ...models.shapes import ModelShape
from ..config import RunConfig
from . import memory

CHECKPOINTING = "--model.activation-checkpointing"
USABLE = 0.95
"""Share of a GPU's memory that a run can count on."""


def scoring(config: RunConfig, shape: ModelShape, gpu_memory: int | None) -> list[str]:
    """What a GPU holds while scoring, where the counts live, and the remedy where it is too much."""
    parts = memory.scoring(config, shape, gpu_memory)
    threshold = memory.counts_threshold(config, shape) / 1e9
    why = f"auto keeps them on a GPU of {threshold:.1f} GB or more, else on the host"
    if config.score.counts != "auto":
        why = f"--score.counts {config.score.counts}"
    elif gpu_memory is None:
        why += "; device assumed here"
    where = "host" if memory.counts_on_host(config, shape, gpu_memory) else "device"
    lines = [
        "Memory of one GPU while scoring",
        *_table(config, shape, parts, memory.scoring_tokens(config), config.data.max_length),
        *([] if config.method.routes else [f"  histogram counts: {where} ({why})"]),
    ]
    if _too_large(parts, gpu_memory):
        fits = memory.scoring_tokens_that_fit(config, shape, USABLE * gpu_memory)
        other = "--score.counts host, or a larger GPU" if config.model.activation_checkpointing else CHECKPOINTING
        remedy = f"--score.tokens-per-batch {fits}, or {other}" if fits else other
        lines.append(f"  too large for {gpu_memory / 1e9:.1f} GB: {remedy}")
    return lines


def training(
    config: RunConfig, shape: ModelShape, world: int, counts: Trainable, micro: int, gpu_memory: int | None
) -> list[str]:
    """What a GPU holds while training `counts` on `world` ranks, `micro` sentences a forward; the remedy as above."""
    kind = "exact" if counts.exact is not None else "the expectation"
    tokens, parts = micro * config.data.max_length, _training_parts(config, shape, world, counts, micro)
    lines = [
        f"Memory of one GPU while training {counts.likely:,} parameters ({kind}), ZeRO stage {config.zero.stage}",
        *_table(config, shape, parts, tokens, memory.training_sequence(config, shape, tokens)),
        f"  longest case: {micro} sentence(s) a forward of {config.data.max_length} tokens",
    ]
    if _too_large(parts, gpu_memory):
        remedy = "--zero.stage 3" if config.model.activation_checkpointing else CHECKPOINTING
        lines.append(f"  too large for {gpu_memory / 1e9:.1f} GB: {remedy}, or a smaller --data.max-length")
    return lines


def _training_parts(
    config: RunConfig, shape: ModelShape, world: int, counts: Trainable, micro: int
) -> list[memory.Part]:
    beside, tokens = config.method.beside(counts), micro * config.data.max_length
    return memory.training(config, shape, world, counts.likely, tokens, beside)


def fit(config: RunConfig, shape: ModelShape, world: int, counts: Trainable, micro: int, gpu_memory: int) -> list[str]:
    """What fits: scoring, and training at every ZeRO stage without and with activation checkpointing."""

    def cell(parts: list[memory.Part]) -> str:
        return (
            f"{memory.device_total(parts) / 1e9:8.1f} GB {'too large' if _too_large(parts, gpu_memory) else 'fits':9}"
        )

    rows, own = [], (config.zero.stage, config.model.activation_checkpointing)
    for stage in (1, 2, 3):
        cells = ""
        for checkpointing in (False, True):
            model = replace(config.model, activation_checkpointing=checkpointing)
            other = replace(config, model=model, zero=replace(config.zero, stage=stage))
            cells += cell(_training_parts(other, shape, world, counts, micro))
            cells += " ← as set  " if (stage, checkpointing) == own else " " * 11
        rows.append(f"  training, stage {stage} {cells}".rstrip())
    lines = [f"What fits in {world} × {gpu_memory / 1e9:.1f} GB ({USABLE:.0%} of it counted on)"]
    if config.method.scores:
        lines.append(f"  scoring           {cell(memory.scoring(config, shape, gpu_memory))}".rstrip())
    return [*lines, f"  {'':18}{'no checkpointing':>21}{'':11}{CHECKPOINTING}", *rows]


def _too_large(parts: list[memory.Part], gpu_memory: int | None) -> bool:
    return gpu_memory is not None and memory.device_total(parts) > USABLE * gpu_memory


def _table(config: RunConfig, shape: ModelShape, parts: list[memory.Part], tokens: int, sequence: int) -> list[str]:
    """The parts, their sum, and what the other choice of activation checkpointing would hold."""
    instead = memory.activations(config, shape, tokens, sequence, not config.model.activation_checkpointing)
    width = max(len(part.name) for part in [*parts, instead])

    def row(part: memory.Part, note: str = "") -> str:
        return f"  {part.name:{width}} {part.bytes / 1e9:8.3f} GB  = {part.formula}{note}"

    return [
        *(row(part, ", on the host" if part.host else "") for part in parts),
        f"  {'together':{width}} {memory.device_total(parts) / 1e9:8.3f} GB",
        row(instead, " (the other choice)"),
    ]
