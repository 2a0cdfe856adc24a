"""The dry run's tables of memory: what a GPU holds while scoring, training and decoding.

`gpu_memory` is one GPU's in bytes, None where it is not known. Settings have no `auto` left (settle.py). The arithmetic
is in weights.py, memory.py and decoding.py. Next: fit.py, which settings fit.
"""

from __future__ import annotations

from ...methods.counts import Trainable
from ...models.shapes import ModelShape
from ..config import RunConfig
from . import memory
from .decoding import NODE, on_quantised, tensor_ranks
from .decoding import decoding as decoding_parts
from .settle import Stage
from .weights import USABLE, Part, device_total, partitioned


def scoring(stage: Stage, shape: ModelShape, world: int, gpu_memory: int | None) -> list[str]:
    """What a GPU holds while scoring."""
    parts = memory.scoring(stage.config, shape, world)
    return [f"Memory of one GPU while {stage.words}{_held(stage.config)}", *_table(parts, gpu_memory)]


def training(stage: Stage, shape: ModelShape, world: int, counts: Trainable, gpu_memory: int | None) -> list[str]:
    """What a GPU holds while training `counts` on `world` ranks, and for the dev loss where that is more."""
    config = stage.config
    kind = "exact" if counts.exact is not None else "the expectation"
    micro = memory.micro_batch(config, world)
    parts, dev = (make(config, shape, world, counts) for make in (memory.trained, memory.dev_loss))
    lines = [
        f"Memory of one GPU while training {counts.likely:,} parameters ({kind}), ZeRO stage "
        f"{memory.zero_stage(config)}, {stage.words.removeprefix('training ')}{_held(config)}",
        *_table(parts, gpu_memory),
        f"  the largest batch: {micro} sentence(s) of {config.data.max_length} tokens",
    ]
    if device_total(dev) > device_total(parts):
        tokens = f"{config.score.batch_tokens:,} tokens a batch"
        lines += [f"  the dev loss takes more, {tokens}:", *_table(dev, gpu_memory)]
    if whole := memory.loading(config, shape):
        flag = "--model.partition on"
        lines.append(f"  before it is cut up each GPU loads the whole model, {whole / 1e9:.1f} GB: {flag} does not")
    return lines


def decoding(config: RunConfig, shape: ModelShape, world: int, gpu_memory: int | None) -> list[str]:
    """What a GPU holds while decoding."""
    parts, ranks = decoding_parts(config, shape, world), tensor_ranks(config, shape, world)
    lines = [f"Memory of one GPU while decoding{_held(on_quantised(config))}", *_table(parts, gpu_memory)]
    if partitioned(config) and ranks < world:
        many = (
            f"groups of {ranks} ranks share a model: as many as divide its heads and a machine's {NODE} GPUs (assumed)"
        )
        slow = "each token gathers all weights, which is slow: this model or method cannot be cut by tensors"
        lines.append(f"  {many if ranks > 1 else slow}")
    return lines


def _held(config: RunConfig) -> str:
    kind = config.model.quantize
    return ", partitioned" if partitioned(config) else f", on a base in {kind}" if kind != "none" else ""


def _table(parts: list[Part], gpu_memory: int | None) -> list[str]:
    """The parts, their sum, and whether that is more than a run can count on in a GPU."""
    width, total = max(len(part.name) for part in parts), device_total(parts)
    large = gpu_memory is not None and total > USABLE * gpu_memory
    note = f"  too large for {gpu_memory / 1e9:.1f} GB, see the end" if large else ""

    def row(part: Part) -> str:
        return f"  {part.name:{width}} {part.bytes / 1e9:8.3f} GB  = {part.formula}{', on the host' * part.host}"

    return [*map(row, parts), f"  {'together':{width}} {total / 1e9:8.3f} GB{note}"]
