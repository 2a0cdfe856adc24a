"""What of the remedies against too little memory (common/errors.py) would not help a stage: in force, or refused."""

from __future__ import annotations

from ...common.errors import BATCH, CHECKPOINTING, COUNTS, MICRO, NF4, ON_QUANTISED, PARTITION, RECOMPUTE, TOKENS
from ..config import RunConfig
from . import memory
from .weights import partitioned


def useless(config: RunConfig, world: int) -> frozenset[str]:
    """`config` is the stage's own, settled: nothing in it is `auto`."""
    model, method = config.model, config.method
    cut, compiled, quantised = partitioned(config), model.compile == "blocks", model.quantize != "none"
    found = {
        TOKENS: config.score.batch_tokens <= config.data.max_length,
        COUNTS: config.score.counts == "host" or method.routes,
        CHECKPOINTING: model.checkpoints,
        NF4: model.quantize == "nf4" or method.trains_whole_weights or cut or compiled or config.zero.stage == 3,
        MICRO: memory.micro_batch(config, world) == 1,
        RECOMPUTE: model.recompute_ffn or not method.trains_slices,
        PARTITION: cut or compiled or quantised or world == 1,
        BATCH: config.evaluate.batch_size == 1,
        ON_QUANTISED: not quantised or config.evaluate.on != "full",
    }
    return frozenset(flag for flag, is_useless in found.items() if is_useless)
