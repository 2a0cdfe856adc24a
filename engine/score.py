"""Statistics of neurons from labelled text: `score.score(model, files)`."""

from .scoring.score import score

__all__ = ["score"]
