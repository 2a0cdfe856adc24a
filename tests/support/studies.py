"""A small study, and what its runs leave, as far as bench/study.py reads it."""

import json
from pathlib import Path

from sacrebleu.metrics import BLEU

from slicetune.engine.common.settings import kept
from slicetune.engine.run.cli import parse
from slicetune.engine.run.compare import load_recipe

LINES = ["the rash fades in a day", "open the file and click on save", "the court dismissed the action", "he said so"]
OTHERS = ["the rash goes in a day", "open a file and press save", "the court dismissed the action", "so he spoke"]

PLAN = """
title = "A trial"
about = "Whether it runs."
seeds = [0, 1]
contrasts = [["full", "base"]]
[parts]
seen = ["it"]
[flags]
"train.epochs" = 1
"data.seen" = ["it"]
"data.unseen" = []
[rates.rows]
full = { recipe = "full_tiny", "train.sweep" = [1e-3, 3e-3] }
[jobs.main.rows]
base = { recipe = "base_tiny" }
full = { recipe = "full_tiny", rate = "full", "train.epochs" = 3 }
[jobs.second]
after = "main"
[jobs.second.rows]
full_second = { recipe = "full_tiny", rate = "full" }
"""


def finished(folder: Path, method: str, lines: list[str], loss: float | None, *flags: str) -> None:
    """What a run leaves, as far as a study reads it; `flags` are those of the run."""
    sides = folder / "translations"
    for name, of in ((method, lines), ("reference", LINES)):
        (sides / name).mkdir(parents=True)
        (sides / name / "it.en").write_text("".join(f"{line}\n" for line in of))
    scores = {"it": {"bleu": BLEU().corpus_score(lines, [LINES]).score, "chrf": 1.0, "n": len(LINES)}}
    about = {"method": method, "seen": ["it"], "unseen": [], "systems": {method: {"domains": scores}}}
    about |= {"trainable_parameters": 7, "seconds": {"all": 1.0}}
    if loss is not None:
        about |= {
            "sweep": {"0.001": loss},
            "learning_rate": 0.001,
            "peak_memory_bytes": 10**9,
            "tokens_per_second": 5.0,
        }
    config = parse(load_recipe(Path(f"{method}_tiny")), ["--data.unseen", "--data.seen", "it", *flags])
    (folder / "config.json").write_text(json.dumps(kept(config)))
    (folder / "results.json").write_text(json.dumps(about))
