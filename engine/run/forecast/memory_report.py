"""The dry run's tables of memory: what a GPU holds while scoring, training and decoding.

`gpu_memory` is one GPU's in bytes, None where it is not known. The arithmetic is in memory.py and decoding.py. Next:
fit.py, what fits.
"""

from __future__ import annotations

from dataclasses import replace

from ...methods.counts import Trainable
from ...models.shapes import ModelShape
from ..config import RunConfig
from . import memory
from .decoding import NODE, tensor_ranks
from .decoding import decoding as decoding_parts

CHECKPOINTING, PARTITION = "--model.activation-checkpointing", "--model.partition on"
USABLE = 0.95
"""Share of a GPU's memory that a run can count on."""
SHORT = 64
"""Tokens of a sample beneath which no remedy goes."""
MORE = "more GPUs, or larger ones"


def scoring(config: RunConfig, shape: ModelShape, world: int, gpu_memory: int | None) -> list[str]:
    """What a GPU holds while scoring, where the counts live, and the remedy where it is too much."""
    parts = memory.scoring(config, shape, world, gpu_memory)
    threshold = memory.counts_threshold(config, shape, world) / 1e9
    why = f"auto keeps them on a GPU of {threshold:.1f} GB or more, else on the host"
    if config.score.counts != "auto":
        why = f"--score.counts {config.score.counts}"
    elif gpu_memory is None:
        why += "; device assumed here"
    where = "host" if memory.counts_on_host(config, shape, world, gpu_memory) else "device"
    lines = [
        f"Memory of one GPU while scoring{_partitioned(config)}",
        *_table(parts, _other_activations(config, shape, memory.scoring_tokens(config), config.data.max_length)),
        *([] if config.method.routes else [f"  histogram counts: {where} ({why})"]),
    ]
    if too_large(parts, gpu_memory):
        fits = memory.scoring_tokens_that_fit(config, shape, world, USABLE * gpu_memory)
        remedies = [f"--score.tokens-per-batch {fits}"] if fits else []
        remedies += _not_yet(config, world) or [*_counts_to_host(parts, gpu_memory), MORE]
        lines.append(f"  too large for {gpu_memory / 1e9:.1f} GB: {', or '.join(remedies)}")
    return lines


def training(
    config: RunConfig, shape: ModelShape, world: int, counts: Trainable, micro: int, gpu_memory: int | None
) -> list[str]:
    """What a GPU holds while training `counts` on `world` ranks, `micro` sentences a forward; the remedy as above."""
    kind = "exact" if counts.exact is not None else "the expectation"
    tokens, parts = micro * config.data.max_length, training_parts(config, shape, world, counts, micro)
    stage, sequence = memory.zero_stage(config), memory.training_sequence(config, shape, tokens)
    lines = [
        f"Memory of one GPU while training {counts.likely:,} parameters ({kind}), ZeRO stage {stage}"
        f"{_partitioned(config)}",
        *_table(parts, _other_activations(config, shape, tokens, sequence)),
        f"  longest case: {micro} sentence(s) a forward of {config.data.max_length} tokens",
    ]
    if stage == 3 and not memory.partitioned(config):
        whole = memory.loading(config, shape) / 1e9
        lines.append(
            f"  before it is cut up each GPU loads the whole model, {whole:.1f} GB: {partition_flag(config)} does not"
        )
    if too_large(parts, gpu_memory):
        remedies = _training_remedies(config, shape, world, counts, micro, gpu_memory)
        lines.append(f"  too large for {gpu_memory / 1e9:.1f} GB: {', or '.join(remedies)}")
    return lines


def decoding(config: RunConfig, shape: ModelShape, world: int, gpu_memory: int | None) -> list[str]:
    """What a GPU holds while decoding, and the remedy as above."""
    parts, ranks = decoding_parts(config, shape, world), tensor_ranks(config, shape, world)
    lines = [f"Memory of one GPU while decoding{_partitioned(config)}", *_table(parts)]
    if memory.partitioned(config) and ranks < world:
        many = (
            f"groups of {ranks} ranks share a model: as many as divide its heads and a machine's {NODE} GPUs (assumed)"
        )
        slow = "each token gathers all weights, which is slow: this model or method cannot be cut by tensors"
        lines.append(f"  {many if ranks > 1 else slow}")
    if too_large(parts, gpu_memory):
        remedies = _decoding_remedies(config, shape, world, gpu_memory)
        lines.append(f"  too large for {gpu_memory / 1e9:.1f} GB: {', or '.join(remedies)}")
    return lines


def training_parts(
    config: RunConfig, shape: ModelShape, world: int, counts: Trainable, micro: int
) -> list[memory.Part]:
    """What one GPU holds while `counts` are trained, `micro` of the longest sentences in a forward."""
    beside, tokens = config.method.beside(counts), micro * config.data.max_length
    return memory.training(config, shape, world, counts.likely, tokens, beside)


def too_large(parts: list[memory.Part], gpu_memory: int | None) -> bool:
    """Whether they are more than a run can count on in a GPU."""
    return gpu_memory is not None and memory.device_total(parts) > USABLE * gpu_memory


def _not_yet(config: RunConfig, world: int) -> list[str]:
    """The settings that save memory and are not made."""
    found = [] if config.model.activation_checkpointing else [CHECKPOINTING]
    return found + ([partition_flag(config)] if world > 1 and not memory.partitioned(config) else [])


def partition_flag(config: RunConfig) -> str:
    """What to type for a partitioned model: torch.compile, which such a one refuses, is off."""
    return PARTITION + " --model.compile off" * (config.model.compile == "blocks")


def _training_remedies(
    config: RunConfig, shape: ModelShape, world: int, counts: Trainable, micro: int, gpu_memory: int
) -> list[str]:
    """Shorter samples only where they can be short enough."""
    short = replace(config, data=replace(config.data, max_length=min(SHORT, config.data.max_length)))
    shorter = not too_large(training_parts(short, shape, world, counts, micro), gpu_memory)
    return _not_yet(config, world) + ["a smaller --data.max-length"] * shorter or [MORE]


def _decoding_remedies(config: RunConfig, shape: ModelShape, world: int, gpu_memory: int) -> list[str]:
    """A smaller batch only where one of a single sentence fits, and more GPUs where more can share the model."""
    single = replace(config, evaluate=replace(config.evaluate, batch_size=1))
    fewer = not too_large(decoding_parts(single, shape, world), gpu_memory)
    remedies = [f"a smaller --evaluate.batch-size than {config.evaluate.batch_size}"] * fewer
    remedies += [partition_flag(config)] * (world > 1 and not memory.partitioned(config))
    ranks, twice = (tensor_ranks(config, shape, number) for number in (world, 2 * world))
    return remedies or [MORE if ranks == 1 or twice > ranks else "larger GPUs"]


def _counts_to_host(parts: list[memory.Part], gpu_memory: int) -> list[str]:
    """The remedy of counts on the host, where they are not there yet and this is enough."""
    rest = [part for part in parts if part.name != "histogram counts"]
    moved = memory.device_total(rest) < memory.device_total(parts) and not too_large(rest, gpu_memory)
    return ["--score.counts host"] if moved else []


def _partitioned(config: RunConfig) -> str:
    return ", partitioned" if memory.partitioned(config) else ""


def _other_activations(config: RunConfig, shape: ModelShape, tokens: int, sequence: int) -> memory.Part:
    """What the other choice of activation checkpointing would hold."""
    return memory.activations(config, shape, tokens, sequence, not config.model.activation_checkpointing)


def _table(parts: list[memory.Part], instead: memory.Part | None = None) -> list[str]:
    """The parts, their sum, and what another choice would hold."""
    width = max(len(part.name) for part in [*parts, *([instead] if instead else [])])

    def row(part: memory.Part, note: str = "") -> str:
        return f"  {part.name:{width}} {part.bytes / 1e9:8.3f} GB  = {part.formula}{note}"

    return [
        *(row(part, ", on the host" if part.host else "") for part in parts),
        f"  {'together':{width}} {memory.device_total(parts) / 1e9:8.3f} GB",
        *([row(instead, " (the other choice)")] if instead else []),
    ]
