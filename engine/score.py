"""Statistics of neurons from labelled text: `score.score(model, files)`."""

import sys

from .commands import main
from .scoring.score import score

__all__ = ["score"]

if __name__ == "__main__":  # python -m slicetune.engine.score was the command once; without this it would do nothing
    sys.exit(main(["score", *sys.argv[1:]]))
