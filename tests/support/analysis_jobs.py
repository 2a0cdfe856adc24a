"""A small run and every analysis of it, in one process: `python analysis_jobs.py BASE OUT`."""

from __future__ import annotations

import sys

from slicetune.engine import commands
from slicetune.engine.common import distributed
from slicetune.engine.data.config import DataConfig
from slicetune.engine.evaluation.config import EvaluateConfig
from slicetune.engine.methods.caneft.settings import Caneft
from slicetune.engine.models.config import ModelConfig
from slicetune.engine.run.config import RunConfig
from slicetune.engine.run.run import run
from slicetune.engine.training.config import TrainConfig


def main(base: str, out: str) -> None:
    distributed.stop = lambda: None  # DeepSpeed keeps to the first group of a process; commands end theirs
    config = RunConfig(
        out=out,
        model=ModelConfig(path=base),
        data=DataConfig(prompt="short", score_sentences=20, train_sentences=8, dev_sentences=3, test_sentences=2),
        method=Caneft(neuron_ratio=0.02),
        train=TrainConfig(learning_rate=0.01, epochs=1, global_batch_size=16, report_to=()),
        evaluate=EvaluateConfig(max_new_tokens=6),
    )
    run(config)
    commands.main(["ask", "chosen", out])
    commands.main(["ask", "overlap", out])
    commands.main(["ask", "silence", out, "--channels", "3", "--sentences", "1"])
    commands.main(["ask", "control", out, "--sentences", "20", "--pool", "150", "--cell", "8"])
    commands.main(["ask", "ratios", out, "--ratios", "0.02", "0.04"])
    small = ["--consensus", "specific", "joint", "--task-ratios", "None", "--best", "1", "--seeds", "0", "1"]
    commands.main(["ask", "readings", out, *small])
    commands.main(["ask", "change", out, f"{out}/analyses/ratios/0.04"])
    commands.main(["ask", "overlap", out, f"{out}/analyses/ratios/0.04"])


if __name__ == "__main__":
    main(*sys.argv[1:])
