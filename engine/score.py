"""Statistics of neurons from labelled text: `score.score(model, files)`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from .commands import main
from .models.config import ModelConfig
from .scoring import score as scoring
from .scoring.config import ScoreConfig
from .scoring.statistics import Statistics

__all__ = ["score"]


def score(
    model: str | ModelConfig,
    files: Sequence[str],
    config: ScoreConfig | None = None,
    out: str | Path = "statistics.safetensors",
    max_length: int = 512,
) -> Statistics:
    """scoring/score.py's, with settings that fit the GPU that is there."""
    from .run.forecast.settle import for_scoring

    return scoring.score(model, files, config, out, max_length, for_scoring)


if __name__ == "__main__":  # python -m slicetune.engine.score was the command once; without this it would do nothing
    sys.exit(main(["score", *sys.argv[1:]]))
