"""Neurons from statistics: `select.select(statistics, Caneft(neuron_ratio=0.01))`."""

import sys

from .commands import main
from .methods.select import select

__all__ = ["select"]

if __name__ == "__main__":  # python -m slicetune.engine.select was the command once; without this it would do nothing
    sys.exit(main(["select", *sys.argv[1:]]))
