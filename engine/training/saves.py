"""A training's checkpoints: where it goes on from, when it leaves one, and which one is exported.

    saves = Saves(out / "checkpoints", train, "auto", identity)
    tensors, progress = saves.resume(model)

The files themselves are checkpoint.py's.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..common import checkpoint, distributed, private
from ..common.errors import UserError
from ..common.settings import differences, table
from ..slices.groups import EVERY_UPDATE, optimizer_groups
from .config import TrainConfig
from .zero import MOMENTS, ZeroEngine


@dataclass
class State:
    """How far training is; a checkpoint's state.json holds it, with its identity and time beside it."""

    step: int = 0
    group_steps: dict[str, int] = field(default_factory=dict)
    best_dev_loss: float = math.inf
    best_step: int = 0
    """Updates after which the dev loss was lowest; 0 before the first was measured."""
    dev_step: int = 0
    """Updates after which the dev loss was last measured."""
    skipped: list[int] = field(default_factory=list)
    """Updates that were left out because a loss or gradient was not finite."""


class Saves:
    """The checkpoints of one run under `root`.

    `resume` is --resume; `identity` is what the checkpoints belong to: model, neurons, data, settings.
    """

    def __init__(self, root: Path, train: TrainConfig, resume: str, identity: dict[str, Any]) -> None:
        self.root, self.train, self.from_, self.identity = root, train, resume, identity

    def save(self, engine: ZeroEngine, state: State) -> None:
        """Write step-N and take older ones away, but the best (a collective)."""
        state.group_steps = engine.group_steps()
        tensors, kept = engine.state(), asdict(state) | {"identity": self.identity, "time": time.time()}

        def write() -> None:
            folder = self.root / f"step-{state.step}"
            checkpoint.save(folder, tensors, kept)
            # After `--resume step-2` there can be newer ones than what was just saved.
            best = self.root / f"step-{state.best_step}"
            checkpoint.prune(self.root, self.train.save_total_limit, folder, best)

        distributed.first(write)

    def resume(self, model: nn.Module) -> tuple[dict[str, Tensor], State]:
        """Tensors and state to go on from; none and a fresh state at the start (a collective).

        Raises UserError for a checkpoint that is damaged, or of another run, with a table of what differs.
        """
        folder = distributed.share_object(distributed.first(lambda: self._find(model)))
        if folder is None:
            return {}, State()
        distributed.print0(f"resume: from {folder}")
        tensors, kept = checkpoint.load(folder)
        kept["group_steps"] = group_steps(kept)
        return tensors, State(**{one.name: kept[one.name] for one in fields(State) if one.name in kept})

    def exported(self, state: State) -> Path:
        """The best checkpoint by dev loss where one was measured and is still whole, else the last."""
        best = self.root / f"step-{state.best_step}"
        if self.train.load_best and state.best_step and checkpoint.fault(best) is None:
            return best
        return self.root / f"step-{state.step}"

    def _find(self, model: nn.Module) -> Path | None:
        """The folder that --resume names, or, on `auto`, the newest whole one, if there is any."""
        resume = self.from_
        if resume == "auto":
            folder, faults = checkpoint.newest(self.root)
            for fault in faults:
                print(f"resume: passed over {fault}", flush=True)
            if folder is None:
                return None
        else:
            folder = Path(resume)
            if not folder.is_dir():
                raise UserError(f"--resume {resume}: no such folder; name a checkpoint step-N, or auto")
        self._check(folder, model)
        return folder

    def _check(self, folder: Path, model: nn.Module) -> None:
        tensors, kept = checkpoint.load(folder)
        other = differences(kept.get("identity", {}), json.loads(json.dumps(self.identity)))
        if other:
            raise UserError(f"{folder} belongs to another run ({table(other)}): use another --out, or its settings")
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        there = {name: tuple(t.shape) for name, t in tensors.items()}
        wanted = {f"{kind}/{n}": private.whole_shape(p) for kind in ("master", *MOMENTS) for n, p in trained.items()}
        other = differences(there, wanted)
        if other:
            raise UserError(f"{folder} holds other tensors than are trained ({table(other)}): use another --out")
        groups = {group["update_group"].key for group in optimizer_groups(trained.values())}
        if uncounted := sorted(groups - group_steps(kept).keys()):
            parts = ", ".join(uncounted)
            raise UserError(f"{folder} does not say how many updates {parts} took part in: use another --out")


def group_steps(kept: dict[str, Any]) -> dict[str, int]:
    """Updates of each group by a state.json; one of before there were groups trained everything in every update."""
    return kept.get("group_steps") or {EVERY_UPDATE.key: kept["step"]}
