"""The training loop: one visible step, under DeepSpeed ZeRO, resumable to the bit.

What is trained is whatever parameters of the model require a gradient (ffn.attach makes the chosen slices so). The
order of sentences is a function of (seed, epoch, step), the loss is normalised by the target tokens of the whole
update, so neither depends on the number of ranks or micro-batches.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import checkpoint, distributed, signals
from .batching import Batch, Example, Order, PairOrder, batches_by_tokens, pack, pad
from .config import RunConfig, TrainConfig, differences, table
from .errors import UserError
from .guard import FiniteWatch, SpikeWatch, check_skipped, warn_of_spike
from .landermt.routed import Router
from .landermt.routing import router_of
from .loss import target_losses, token_weights
from .metrics import Metrics
from .models import packs_long_rows, takes_position_ids
from .zero import MOMENTS, ZeroEngine, load_masters


@dataclass(frozen=True)
class Plan:
    """How many steps, and how an update's sentences are split: derived from the settings, printed at the start."""

    sentences: int
    micro_batch: int
    accumulation: int
    updates_per_epoch: int
    steps: int

    @staticmethod
    def of(train: TrainConfig, sentences: int, world: int, updates_per_epoch: int = 0) -> Plan:
        """`updates_per_epoch` where the order of sentences says it: micro-batches of one pair fill updates less."""
        micro = train.micro_batch_size or math.ceil(train.global_batch_size / world)
        accumulation = math.ceil(train.global_batch_size / (micro * world))
        updates = updates_per_epoch or math.ceil(sentences / train.global_batch_size)
        steps = updates * train.epochs
        return Plan(sentences, micro, accumulation, updates, min(steps, train.max_steps or steps))

    def __str__(self) -> str:
        return (
            f"{self.sentences} sentences, {self.updates_per_epoch} updates an epoch, {self.steps} in all; an update is "
            f"{self.accumulation} micro-batch(es) of up to {self.micro_batch} sentences on each rank"
        )


def learning_rate(train: TrainConfig, step: int, steps: int) -> float:
    """Rate of update `step` (0 is the first) out of `steps`: linear warm-up, then the named schedule."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(1, steps - train.warmup_steps)
    if train.lr_scheduler == "linear":
        return train.learning_rate * (1 - progress)
    if train.lr_scheduler == "cosine":
        return train.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    return train.learning_rate


class Batcher:
    """Examples to batches on this rank's device, packed or padded; the router of a routed model is told of each."""

    def __init__(self, packed: bool, pad_id: int, router: Router | None = None) -> None:
        self.packed, self.pad_id, self.router = packed, pad_id, router
        self.device = distributed.device()

    def __call__(self, examples: Sequence[Example], weights: Sequence[float] | None = None) -> Batch:
        batch = (pack(examples, weights) if self.packed else pad(examples, self.pad_id, weights)).to(self.device)
        if self.router:
            self.router.read(batch)
        return batch

    def filled(self, examples: Sequence[Example], filler: Example) -> Batch:
        """A rank without a sentence runs `filler` with weight 0: every rank takes part in every collective."""
        return self(examples) if examples else self([filler], [0.0])


def train(
    model: nn.Module,
    config: RunConfig,
    examples: Sequence[Example],
    dev: Sequence[Example],
    out: Path,
    *,
    pad_id: int,
    identity: dict[str, Any],
) -> Path:
    """Train the parameters of `model` that require a gradient; returns the checkpoint folder to export.

    `identity` names what a checkpoint belongs to (model, neurons, data, settings): a resume with another one is
    refused. Raises UserError on a loss or gradient that is not finite on any rank, before any weight changes (or skips
    that update: `non_finite`), and Interrupted, with the step saved, after a signal to any rank.
    """
    rank, world = distributed.rank(), distributed.world()
    router = router_of(model)
    order = _order(config, examples, router)
    plan = Plan.of(config.train, len(examples), world, order.updates_per_epoch)
    distributed.print0(f"training: {plan}")
    root = out / "checkpoints"
    tensors, state = _resume(model, root, config.resume, identity)
    if state["step"] >= plan.steps:
        distributed.print0(f"training: already complete at step {state['step']}")
        return _chosen(root, state, config.train.load_best)
    if tensors:
        load_masters(model, tensors)
    model.train()
    engine = ZeroEngine(model, config, plan.micro_batch, plan.accumulation)
    if tensors:
        engine.load_state(tensors, state["group_steps"])
    batcher = Batcher(takes_position_ids(model), pad_id, router)
    dev_batcher = Batcher(packs_long_rows(model), pad_id, router)
    metrics = Metrics(out, config, plan.steps, state["step"], model)
    every = config.train.eval_steps or plan.updates_per_epoch
    save_every = config.train.save_steps or plan.updates_per_epoch
    watch, spikes = FiniteWatch(engine.params.values(), config.train.non_finite == "skip"), SpikeWatch()
    if state["step"] and state["step"] % every == 0 and state["dev_step"] != state["step"]:  # a stop left it out
        _evaluate(engine, dev_batcher, dev, config, state, state["step"], metrics)

    for step in range(state["step"], plan.steps):
        # ------------------------------------------------------------------ one update
        epoch, within = divmod(step, plan.updates_per_epoch)
        update = order.update(epoch, within)
        tokens = sum(len(examples[i].input_ids) - examples[i].target_start for i in update)
        pairs = router.names(examples[i].group for i in update) if router else None
        engine.begin_update(learning_rate(config.train, step, plan.steps), pairs)
        total, finite = 0.0, True
        for indices in order.share(epoch, within, rank, world, plan.accumulation):
            batch = batcher.filled([examples[i] for i in indices], examples[update[0]])
            losses = target_losses(engine, batch)
            loss = (losses * token_weights(batch)).sum() / tokens
            engine.backward(loss * (world * plan.accumulation))  # DeepSpeed averages over both
            value = watch.check(loss, batch, step)
            total, finite = total + (value or 0.0), finite and value is not None
            applied = engine.step(discard=not finite)
        # ------------------------------------------------------------------
        done = step + 1
        read = sum(len(examples[i].input_ids) for i in update)
        total, signalled = distributed.sums(total, float(signals.requested()))
        stopping = bool(signalled) and done < plan.steps
        if not applied:
            state["skipped"] = [*state["skipped"], done]
            check_skipped(state["skipped"])
        metrics.step(done, epoch, total if finite else None, engine, read, len(state["skipped"]))
        if applied:
            uids, rate = [examples[i].uid for i in update], learning_rate(config.train, step, plan.steps)
            warn_of_spike(spikes, total, done, rate, uids, config.train.loss_spike == "stop")
        elif finite:
            distributed.print0(f"warning: step {done}: DeepSpeed skipped the update: its summed gradient overflowed")
        if (done % every == 0 or done == plan.steps) and not stopping:  # evaluation can take longer than 30 s
            _evaluate(engine, dev_batcher, dev, config, state, done, metrics)
        if done % save_every == 0 or done == plan.steps or state["best_step"] == done or stopping:
            _save(engine, root, state | {"step": done}, identity, config.train)
        state["step"] = done
        if stopping:
            metrics.close()
            raise signals.interrupted(f"training, at step {done} of {plan.steps}, which is saved")
    watch.close()
    metrics.close()
    engine.close()
    return _chosen(root, state, config.train.load_best)


def _order(config: RunConfig, examples: Sequence[Example], router: Router | None) -> Order | PairOrder:
    """A routed model reads micro-batches of one pair. Raises UserError where an update does not divide into them."""
    update, micro = config.train.global_batch_size, config.train.micro_batch_size
    if router is None:
        return Order(config.seed, len(examples), update)
    if not micro or update % micro:
        raise UserError(
            f"--train.global-batch-size {update}, --train.micro-batch-size {micro}: a routed model reads micro-batches "
            "of one pair, and whole ones an update: set both, as in 80 and 8"
        )
    return PairOrder(config.seed, [example.group for example in examples], update // micro, micro)


def dev_loss(
    model: Callable[..., Any], batcher: Batcher, dev: Sequence[Example], tokens_per_batch: int = 4096
) -> float:
    """Mean cross-entropy of the target tokens of `dev`, in nats a token, over all ranks (a collective)."""
    rank, world = distributed.rank(), distributed.world()
    batches = list(batches_by_tokens(dev, tokens_per_batch, batcher.packed))
    total = count = 0.0
    with torch.no_grad():
        for turn in range(0, len(batches), world):  # every rank runs as many forwards: ZeRO-3 gathers in each
            mine = batches[turn + rank] if turn + rank < len(batches) else []
            batch = batcher.filled([dev[i] for i in mine], dev[0])
            weights = token_weights(batch)
            total += float((target_losses(model, batch) * weights).sum(dtype=torch.float64))
            count += float(weights.sum())
    return distributed.agree(total, "sum") / distributed.agree(count, "sum")


def _evaluate(engine, batcher, dev, config, state, step, metrics) -> None:
    if not dev:
        return
    loss = dev_loss(engine, batcher, dev, config.score.tokens_per_batch)
    state["dev_step"] = step
    if loss < state["best_dev_loss"]:
        state |= {"best_dev_loss": loss, "best_step": step}
    metrics.dev(step, loss)


def _save(engine: ZeroEngine, root: Path, state: dict, identity: dict, config: TrainConfig) -> None:
    tensors, state = engine.state(), state | {"group_steps": engine.group_steps()}

    def write() -> None:
        folder = root / f"step-{state['step']}"
        checkpoint.save(folder, tensors, state | {"identity": identity, "time": time.time()})
        # After `--resume step-2` there can be newer ones than what was just saved.
        checkpoint.prune(root, config.save_total_limit, folder, root / f"step-{state['best_step']}")

    distributed.first(write)


def _resume(
    model: nn.Module, root: Path, resume: str, identity: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and state to go on from; none and a fresh state at the start."""
    fresh = {"step": 0, "group_steps": {}, "best_dev_loss": math.inf, "best_step": 0, "dev_step": 0, "skipped": []}
    folder = distributed.share_object(distributed.first(lambda: _find(model, root, resume, identity)))
    if folder is None:
        return {}, fresh
    distributed.print0(f"resume: from {folder}")
    tensors, state = checkpoint.load(folder)
    return tensors, {key: state.get(key, first) for key, first in fresh.items()}


def _find(model: nn.Module, root: Path, resume: str, identity: dict[str, Any]) -> Path | None:
    """The checkpoint to go on from: `resume`, or, on `auto`, the newest whole one under `root`, if there is any.

    Raises UserError for one that is damaged, or of another run, with a table of what differs.
    """
    if resume == "auto":
        folder, faults = checkpoint.newest(root)
        for fault in faults:
            print(f"resume: passed over {fault}", flush=True)
        if folder is None:
            return None
    else:
        folder = Path(resume)
        if not folder.is_dir():
            raise UserError(f"--resume {resume}: no such folder; name a checkpoint step-N, or auto")
    tensors, state = checkpoint.load(folder)
    other = differences(state.get("identity", {}), json.loads(json.dumps(identity)))
    if other:
        raise UserError(f"{folder} belongs to another run ({table(other)}): use another --out, or its settings")
    wanted = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    there = {name: tuple(t.shape) for name, t in tensors.items()}
    other = differences(there, {f"{kind}/{n}": shape for kind in ("master", *MOMENTS) for n, shape in wanted.items()})
    if other:
        raise UserError(f"{folder} holds other tensors than are trained ({table(other)}): use another --out")
    return folder


def _chosen(root: Path, state: dict[str, Any], load_best: bool) -> Path:
    """The best checkpoint by dev loss where one was measured and is still whole, else the last."""
    best = root / f"step-{state['best_step']}"
    if load_best and state["best_step"] and checkpoint.fault(best) is None:
        return best
    return root / f"step-{state['step']}"
