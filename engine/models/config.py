"""Which model, and how it is loaded: --model.*."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..common.settings import matters


@dataclass
class ModelConfig:
    """Which model, and how it is loaded."""

    path: str = "tiny"
    """A Hugging Face folder, a hub id, or `tiny`: a small Llama that is generated and pretrained on the spot, German to
    English; `tiny-pairs` translates both ways."""
    attention: Literal["auto", "flash", "varlen", "sdpa", "eager"] = "auto"
    """`auto` takes on a GPU flash-attn where it is installed, else torch's own attention over packed rows (`varlen`)
    where it can, else, and on a CPU, torch's sdpa; the chosen path is printed."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: bfloat16 on a GPU (fp32 masters for the slices), float32 on a CPU."""
    quantize: Literal["none", "nf4", "int8", "fp8"] = "none"
    """Hold the frozen linear layers of the blocks in 4 bits (`nf4`, QLoRA's) or 8 (`int8`), by bitsandbytes. `fp8`
    multiplies them in 8 bits: an experiment, for Ada, Hopper and later GPUs. What is trained and what is exported has
    full precision."""
    activation_checkpointing: Literal["auto", "off", "on"] = "auto"
    """`on`: recompute each block in the backward pass: less memory, about a third more time. `auto`: on in a stage
    (scoring, training) that does not fit the GPU without it, by the dry run's arithmetic; off without a GPU. It
    changes no result."""
    recompute_ffn: bool = False
    """Keep an FFN's input alone and compute gate and up again: an eighth of its memory, a third more FFN time."""
    compile: Literal["off", "blocks"] = "off"
    """`blocks`: torch.compile each decoder block for training, at ZeRO stages 1 and 2; the first updates wait for the
    compiler. Scoring, dev loss and decoding run uncompiled."""
    partition: Literal["auto", "off", "on"] = matters("", "auto")
    """`on`: each rank holds its share of the weights while it loads, scores and trains (ZeRO stage 3, whatever
    --zero.stage says) and decodes by tensor parallelism; `off`: each holds the whole model. `auto`: on where a GPU does
    not hold what the dry run counts for the whole model (`slicetune score`: where half a GPU does not hold the
    weights). Results are those of ZeRO stage 3, which adds up some gradients in another order than stage 1."""

    def __post_init__(self) -> None:
        if isinstance(self.activation_checkpointing, bool):  # what older runs have stored, and older programs pass
            self.activation_checkpointing = "on" if self.activation_checkpointing else "off"

    @property
    def checkpoints(self) -> bool:
        """Whether activations are checkpointed; not where it is still `auto`."""
        return self.activation_checkpointing == "on"
