"""What a run says while it trains: how far it is, metrics.jsonl, TensorBoard, W&B. Only the first rank writes."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common import distributed
from ..common.output import Bar
from ..common.private import whole_size
from .config import TrainConfig


class Metrics:
    """One line of metrics.jsonl a logged step; the same numbers go to the bar and the trackers.

    `settings` are the run's, for the trackers that show them. After a resume at step `start`, lines of steps beyond it
    (of the part that was lost) are taken out.
    """

    def __init__(
        self, out: Path, train: TrainConfig, settings: dict[str, Any], steps: int, start: int, model: nn.Module
    ) -> None:
        self.path, self.every, self.steps = out / "metrics.jsonl", train.logging_steps, steps
        self.first = distributed.rank() == 0
        self.flops_per_token = training_flops_per_token(model)
        self.peak = matmul_flops(distributed.device(), next(model.parameters()).dtype) * distributed.world()
        self.tokens, self.since = 0, time.perf_counter()
        self.bar = self.board = self.wandb = None
        if not self.first:
            return
        out.mkdir(parents=True, exist_ok=True)
        _truncate(self.path, start)
        self.bar = Bar("train", steps, "step", start)
        self._trackers(out, train, settings)

    def _trackers(self, out: Path, train: TrainConfig, settings: dict[str, Any]) -> None:
        if "tensorboard" in train.report_to:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "tensorboard"))
        if "wandb" in train.report_to:
            import wandb

            self.wandb = wandb.init(project="slicetune", dir=str(out), config=settings, resume="allow")

    def step(self, step: int, epoch: int, loss: float | None, engine: Any, tokens: int, skipped: int) -> None:
        """Count an update of `tokens` tokens over all ranks; write every `logging_steps`.

        `loss` is None where it was not finite; `skipped` updates were left out since the start of training.
        """
        self.tokens += tokens
        if self.bar:
            self.bar.add(1)
        if step % self.every and step != self.steps:
            return
        norm = engine.gradient_norm() if loss is not None else None
        now = time.perf_counter()
        rate = self.tokens / (now - self.since)
        self.tokens, self.since = 0, now
        row = {"step": step, "epoch": epoch, "loss": loss, "lr": engine.optimizer.param_groups[0]["lr"]}
        row |= {"grad_norm": norm, "tokens_per_second": rate, "mfu": rate * self.flops_per_token / self.peak}
        row |= {"peak_memory_bytes": peak_memory(), "skipped_steps": skipped, "time": time.time()}
        self._write(row)
        if self.bar:
            shown = "not finite" if loss is None else f"{loss:.3f}"
            left_out = f", {skipped} skipped" if skipped else ""
            self.bar.tell(f"loss {shown}, {rate:,.0f} tokens/s, MFU {row['mfu']:.0%}{left_out}")

    def dev(self, step: int, loss: float) -> None:
        self._write({"step": step, "dev_loss": loss, "time": time.time()})
        if self.bar:
            self.bar.write(f"step {step}: dev loss {loss:.4f}")

    def _write(self, row: dict[str, Any]) -> None:
        if not self.first:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.board:
            for key, value in row.items():
                if key not in ("step", "time") and value is not None:
                    self.board.add_scalar(key, value, row["step"])
        if self.wandb:
            self.wandb.log(row, step=row["step"])

    def close(self) -> None:
        for tracker in (self.bar, self.board):
            if tracker:
                tracker.close()
        if self.wandb:
            self.wandb.finish()


def training_flops_per_token(model: nn.Module) -> float:
    """2 a weight for the forward, 2 for the gradient of the input, 2 more a trained weight (attention left out).

    A partitioned parameter (ZeRO-3) counts with its whole size; a tied embedding counts once, as the output head.
    """
    embedding = model.get_input_embeddings().weight
    tied = embedding is getattr(model.get_output_embeddings(), "weight", None)
    frozen = sum(whole_size(p) for p in model.parameters() if not p.requires_grad and (tied or p is not embedding))
    return 4.0 * frozen + 2.0 * sum(whole_size(p) for p in model.parameters() if p.requires_grad)


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a square matrix product, measured here and now: what MFU is a share of."""
    size, repeats = (4096, 10) if device.type == "cuda" else (1024, 3)
    if device.type == "cpu" and dtype != torch.float32:
        size = 256  # half precision without instructions for it: 1,024 would take a minute
    a = torch.randn(size, size, device=device, dtype=torch.float32).to(dtype)
    a @ a
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        a @ a
    _synchronize(device)
    return repeats * 2 * size**3 / (time.perf_counter() - start)


def peak_memory() -> int:
    """Peak bytes of this rank since `reset_peak_memory`: allocated on its GPU, or resident in the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024
    except (OSError, TypeError):  # no Linux: since the process's start
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory() -> None:
    """Let `peak_memory` count from here (on a CPU where Linux lets a process reset its own mark)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _truncate(path: Path, step: int) -> None:
    """Keep the lines of steps up to `step`; a line that a kill cut short goes."""
    if not path.is_file():
        return
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] <= step:
            rows.append(json.dumps(row))
    path.write_text("".join(f"{row}\n" for row in rows))
