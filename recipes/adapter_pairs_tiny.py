"""Bottleneck adapters on the embedded model of two directions.

torchrun --nproc_per_node 2 recipes/adapter_pairs_tiny.py
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.adapter import Adapter
from slicetune.recipes.models.pairs_tiny import row

CONFIG = row("adapter", Adapter(width=24))

if __name__ == "__main__":
    main(CONFIG)
