"""What a child of fault_pool.py can be asked to do; `disk.arm()` marks where its disk operations begin to count."""

from __future__ import annotations

import contextlib
import io
import os
import resource
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  (imported before the forks, so that a trial takes a second)
import torch
import toys

from slicetune.engine.common import checkpoint, distributed
from slicetune.engine.models.config import ModelConfig
from slicetune.engine.models.load import load_model
from slicetune.engine.models.shapes import from_config
from slicetune.engine.scoring.config import ScoreConfig
from slicetune.engine.scoring.passes import score
from slicetune.engine.scoring.progress import Progress
from slicetune.engine.scoring.share import Share
from slicetune.engine.slices.ffn import attach
from slicetune.engine.training.train import Setup, train

STEPS = 6


def warm_up() -> None:
    torch.set_num_threads(1)


def tensors(step: int) -> dict[str, torch.Tensor]:
    """What the checkpoint of `step` holds: enough bytes for several writes."""
    return {
        f"{key}/{name}": torch.full((7, 300), float(step + i))
        for i, key in enumerate(("master", "exp_avg", "exp_avg_sq"))
        for name in ("a", "b")
    }


def save_one(disk: Any, root: str, step: int, keep: int) -> None:
    """One save and its pruning, as training's `_save` does."""
    disk.arm()
    checkpoint.save(Path(root) / f"step-{step}", tensors(step), {"step": step})
    checkpoint.prune(Path(root), keep)


def save_limited(disk: Any, root: str, step: int, limit: int) -> None:
    """The same where the kernel refuses to let a file grow beyond `limit` bytes, as a quota does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    checkpoint.save(Path(root) / f"step-{step}", tensors(step), {"step": step})


def run_limited(disk: Any, base: str, out: str, limit: int) -> tuple[int, str]:
    """A whole run where no file can grow beyond `limit` bytes (0: no limit); its exit code and what it says."""
    from jobs import SMALL

    from slicetune.engine.data.config import DataConfig
    from slicetune.engine.run.cli import main
    from slicetune.engine.run.config import RunConfig

    flags = SMALL | {"--model.path": base, "--out": out}
    said = io.StringIO()
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with contextlib.redirect_stderr(said):
        try:
            main(RunConfig(data=DataConfig(prompt="short")), [word for pair in flags.items() for word in pair if word])
        except SystemExit as stop:
            return int(stop.code or 0), said.getvalue()
    return 0, said.getvalue()


def train_toys(disk: Any, out: str, overrides: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Six updates with a checkpoint every two, in one process; the last checkpoint's tensors."""
    model = toys.model()
    attach(model, toys.neurons())
    settings = {"train_save_steps": 2, "train_max_steps": STEPS, "train_epochs": 3} | overrides
    config = toys.config(out, **settings)
    distributed.start()
    disk.arm()
    folder = train(model, config.train, Setup(0), toys.examples(10), [], Path(out), {"toy": 1})
    newest, _ = checkpoint.newest(folder.parent)
    return checkpoint.load(newest)[0]


def score_toys(
    disk: Any, out: str, stop_after: int, rank: int = 0, world: int = 1, port: int = 0, folder: str = ""
) -> dict[str, Any]:
    """A rank's scoring pass that saves after every turn; after `stop_after` batches it is killed (0: not).

    The model lies in `folder` and is partitioned, or is a toy that each rank has whole. "saved" has the disk
    operations until each turn's save was done.
    """
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        distributed.start(timeout_minutes=2)
    config, saved = ScoreConfig(tokens_per_batch=40), {}
    parts = {"config": ModelConfig(), "device": distributed.device(), "held": "partitioned"}
    model = load_model(folder, **parts) if folder else toys.model()
    progress = Progress(Path(out), {"toy": 1}, minutes=0.0)
    share = Share(["a", "b"], from_config(model.config), -40, "cpu", rank, world)
    done = progress.resume(share)
    disk.arm()

    def after(number: int) -> None:
        progress.after_batch(share, number)
        saved[number] = disk.count
        if stop_after and number == stop_after:
            os.kill(os.getpid(), 9)

    score(model, toys.examples(30), share, config, rank=rank, world=world, done=done, after_batch=after)
    distributed.stop()
    return {"histogram": share.histogram, **share._small(), "resumed at": done, "saved": saved}
