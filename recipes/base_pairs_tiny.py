"""The embedded model of two directions as it is, zero-shot.

torchrun --nproc_per_node 2 recipes/base_pairs_tiny.py
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.base import Base
from slicetune.recipes.models.pairs_tiny import untrained

CONFIG = untrained("base", Base())

if __name__ == "__main__":
    main(CONFIG)
