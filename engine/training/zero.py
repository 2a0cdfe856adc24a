"""DeepSpeed ZeRO around the trained slices: configure, initialise, step, gather and restore state.

Everything here was read in DeepSpeed 0.19.8; the comments say what would go wrong without it. Stage 3 partitions the
weights too: an FFN's are gathered together (`ZeroEngine.__init__`), state is set a rank's part at a time (`_set`), and
every forward writes the slices anew (slices/linear.py). Next: train.py, the
loop; checkpoint.py, what is written.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..common import private
from ..common.checkpoint import MASTER
from ..common.distributed import device, rank, world
from ..data.batching import Batch
from ..models.large import partition
from ..scoring.loss import Losses
from ..slices.groups import activate, optimizer_groups
from ..slices.optim import SparseColumnAdamW
from ..slices.written import leave_to_optimizer
from .config import TrainConfig
from .plan import Plan

MOMENTS = ("exp_avg", "exp_avg_sq")


def deepspeed_config(
    train: TrainConfig, stage: int, plan: Plan, bf16: bool, limits: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """DeepSpeed's configuration of a run; `limits` are partition.limits, of stage 3.

    Gradients are summed over ranks and micro-batches in fp32: in bf16 the stages would reduce at different moments
    and differ by 2⁻⁹ of the gradient.
    """
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False}
    if limits:  # memory_efficient_linear: private.zero3_linear stands in its place
        zero |= {f"stage3_{name}": value for name, value in limits.items()} | {"memory_efficient_linear": False}
    return {
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": bf16},
        "steps_per_print": 10**9,
    }


class ZeroEngine:
    """One model under DeepSpeed: `backward`, `step`, and the state of its trained parameters by name.

    `params` are those to train (all others are frozen). State is `{"master/<name>", "exp_avg/<name>",
    "exp_avg_sq/<name>"}` in fp32, whole, whatever the stage and the number of ranks.
    """

    def __init__(self, model: nn.Module, train: TrainConfig, stage: int, plan: Plan) -> None:
        deepspeed = private.deepspeed()
        self.stage = stage
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = SparseColumnAdamW(
            optimizer_groups(self.params.values()),
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_epsilon,
            weight_decay=train.weight_decay,
        )
        bf16 = next(iter(self.params.values())).dtype == torch.bfloat16
        if self.stage == 3:
            # DoRA reads its layer's weights itself: they are gathered together with it. (A FusedFFN says so: fused.py.)
            deepspeed.utils.set_z3_leaf_modules(model, _leaves(model), raise_if_not_found=False)
            # A leaf's gradients are reduced when the gradient of its input is there. In a frozen model the first
            # FFN's input needs none, the hook then fires before that FFN's backward, and zeros would be reduced.
            model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
        else:
            partition.same_sums(model)
        self.written = leave_to_optimizer(model) if self.stage < 3 else None
        limits, self.ending = None, contextlib.ExitStack()
        if self.stage == 3:
            limits = partition.limits(model)
            self.ending.enter_context(private.zero3_linear())
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=Losses(model),
            optimizer=optimizer,
            config=deepspeed_config(train, stage, plan, bf16, limits),
            dist_init_required=False,
        )
        private.same_timeout(device())
        self.client = optimizer
        self._create_state()

    def __call__(self, batch: Batch) -> Tensor:
        """The losses of loss.target_losses."""
        return self.engine(batch)

    def begin_update(self, lr: float, pairs: Collection[str] | None = None) -> None:
        """Set the next update's learning rate, and, of a routed model, the language pairs whose units it trains.

        Every rank names the pairs of the whole update, its own or not, so all agree on which groups are skipped.
        """
        activate(self.client.param_groups, pairs)
        for group in self.client.param_groups:
            group["lr"] = lr * group["update_group"].rate

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, discard: bool = False) -> bool:
        """End a micro-batch; at the boundary update. False if there was no update: `discard`, or DeepSpeed skipped it.

        An update is discarded by its optimizer: DeepSpeed steps, and so drops the gradients as ever, while every
        parameter group is inactive, so that values, moments and step counts stay.
        """
        boundary = self.engine.is_gradient_accumulation_boundary()
        if not (boundary and discard):
            self.engine.step()
            if boundary and self.written is not None:
                self.written()  # DeepSpeed updates flat partitions, whose optimizer cannot see the slices' weights
            return not boundary or self.engine.was_step_applied()
        was = [group["active"] for group in self.client.param_groups]
        for group in self.client.param_groups:
            group["active"] = False
        self.engine.step()
        for group, active in zip(self.client.param_groups, was, strict=True):
            group["active"] = active
        return False

    def gradient_norm(self) -> float:
        """Global norm of the last update's gradient (before clipping); NaN where DeepSpeed did not compute it."""
        norm = self.engine.get_global_grad_norm()
        return math.nan if norm is None else float(norm)

    def state(self) -> dict[str, Tensor]:
        """fp32 masters and moments on the host, whole, on the first rank; a collective: every rank calls it."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state: dict[str, Tensor] = {}
        for name, param in self.params.items():
            whole = {"master": safe_get_full_fp32_param(param)}
            whole |= {key: safe_get_full_optimizer_state(param, key) for key in MOMENTS}
            if rank() == 0:
                state |= {f"{key}/{name}": value.cpu().clone() for key, value in whole.items()}
        return state

    def group_steps(self) -> dict[str, int]:
        """How many updates each group of parameters took part in, by the group's key."""
        state = self.client.state
        return {group["update_group"].key: int(state[p]["step"]) for group, p in self._partitions()}

    def load_state(self, state: dict[str, Tensor], group_steps: Mapping[str, int]) -> None:
        """Restore `state()` and `group_steps()`.

        `load_masters` must have put the low-precision parameters right before the engine was made: DeepSpeed's
        setters write the fp32 master alone.
        """
        for group, part in self._partitions():
            self.client.create_state(part, group_steps[group["update_group"].key])
        for name, param in self.params.items():
            self._set(param, state[MASTER + name], None)
            for key in MOMENTS:
                self._set(param, state[f"{key}/{name}"], key)

    def _create_state(self) -> None:
        """Zero moments for every flat partition, linked to the parameters."""
        for _, part in self._partitions():
            self.client.create_state(part)
        private.link_states(self.optimizer)

    def _partitions(self) -> list[tuple[dict[str, Any], Tensor]]:
        """Every parameter group's fp32 flat tensors that the client optimizer really updates."""
        return private.flat_partitions(self.optimizer, self.client.param_groups)

    def _set(self, param: nn.Parameter, value: Tensor, key: str | None) -> None:
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if self.stage < 3:
            value = value.to(param.device)
            if key is None:
                safe_set_full_fp32_param(param, value)
            else:
                safe_set_full_optimizer_state(param, value, key)
            return
        # Stage 3's full setter narrows by the padded size and raises where numel does not divide by the ranks.
        part, where = private.shard_of(param)
        padded = torch.zeros(part * world(), dtype=torch.float32)
        padded[: value.numel()] = value.flatten()
        local = padded[part * rank() : part * (rank() + 1)].to(where)
        if key is None:
            safe_set_local_fp32_param(param, local)
        else:
            safe_set_local_optimizer_state(param, local, key)

    def close(self) -> None:
        self.engine.destroy()
        private.forget(self.engine.module)
        self.ending.close()


def _leaves(model: nn.Module) -> list[type[nn.Module]]:
    """Kinds of modules whose forward reads a child's weight without calling the child, and that do not say so."""
    return list({type(m) for m in model.modules() if getattr(m, "lora_magnitude_vector", 0)})
