"""Settings of training and of ZeRO: --train.* and --zero.*."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..common.errors import UserError
from ..common.settings import check_bounds, matters


@dataclass
class TrainConfig:
    """Training of the chosen slices."""

    learning_rate: float = 1e-5
    """The default is the rate of CANEFT's authors' program."""
    sweep: tuple[float, ...] = ()
    """Train once with each of these learning rates instead, and go on with the lowest dev loss."""
    epochs: int = 2
    """Passes over the training sentences."""
    max_steps: int = 0
    """Stop after so many optimizer steps; 0 trains all epochs."""
    global_batch_size: int = 5
    """Sentences of one optimizer step over all ranks (the authors' program: 5)."""
    micro_batch_size: int = 0
    """Sentences of one forward on one rank; 0 splits the global batch over the ranks without accumulation."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    """Optimizer steps in which the rate rises from 0."""
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 0.0
    """Clip the gradient's global norm; 0 does not clip."""
    eval_steps: int = 0
    """Dev loss every so many steps; 0 is once an epoch."""
    save_steps: int = matters("", 0)
    """A checkpoint every so many steps; 0 is once an epoch."""
    save_total_limit: int = matters("", 2)
    """Checkpoints kept, the best one apart."""
    load_best: bool = True
    """Export the checkpoint with the lowest dev loss rather than the last."""
    loss_spike: Literal["warn", "stop"] = matters("", "warn")
    """What to do when an update's loss jumps far above its running mean: say so, or stop before the next save."""
    non_finite: Literal["stop", "skip"] = matters("", "stop")
    """What to do with an update whose loss or gradient is NaN or infinite on any rank: stop before it, or leave it out,
    so that no weight, moment or step count changes. Its sentences are named; ten in a row stop the run."""
    logging_steps: int = matters("", 10)
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = matters("", ("tensorboard",))

    def __post_init__(self) -> None:
        for rate in (self.learning_rate, *self.sweep):
            if not 0 < rate < math.inf:
                raise UserError(f"--train.learning-rate {rate}: must be above 0")
        if not (self.adam_beta1 < 1 and self.adam_beta2 < 1):
            raise UserError(f"--train.adam-beta1 {self.adam_beta1}, -beta2 {self.adam_beta2}: must be below 1")
        whole, natural = (1, math.inf), (0, math.inf)
        bounds = dict.fromkeys(("epochs", "global_batch_size", "logging_steps"), whole)
        bounds |= dict.fromkeys(("max_steps", "micro_batch_size", "warmup_steps", "eval_steps", "save_steps"), natural)
        bounds |= dict.fromkeys(("save_total_limit", "weight_decay", "max_grad_norm"), natural)
        bounds |= {"adam_beta1": (0, 1), "adam_beta2": (0, 1), "adam_epsilon": (1e-30, 1)}
        check_bounds(self, "train", bounds)


@dataclass
class ZeroConfig:
    """DeepSpeed ZeRO."""

    stage: Literal[1, 2, 3] = 1
    """1 partitions optimizer state, 2 gradients too, 3 parameters too while training. For a model that one GPU does not
    hold: --model.partition."""
