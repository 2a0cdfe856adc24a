"""A two-rank training for torchrun whose rank 1 raises, or hangs, before its fifth update: test_first_error.py."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "support"))  # as a program, it is not in pytest's path

import toys

from slicetune.engine.common import distributed
from slicetune.engine.common.command import one_line
from slicetune.engine.run import status
from slicetune.engine.slices.ffn import attach
from slicetune.engine.training.train import Setup, train


def main(out: Path) -> None:
    model = toys.model()
    attach(model, toys.neurons())
    calls = []

    def fail(module, args, output) -> None:
        calls.append(1)
        if distributed.rank() == 1 and len(calls) == 5 and (out / "hang").exists():
            time.sleep(600)
        if distributed.rank() == 1 and len(calls) == 5 and not (out / "failed").exists():
            (out / "failed").touch()
            raise RuntimeError("a fault of rank 1")

    model.model.norm.register_forward_hook(fail)
    distributed.start(timeout_minutes=0.75 if (out / "hang").exists() else 3)
    with one_line(), status.recorded(out):
        config = toys.config(str(out), train_save_steps=1, train_eval_steps=100)
        train(model, config.train, Setup(0), toys.examples(23), [], out, {"toy": 1})
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
