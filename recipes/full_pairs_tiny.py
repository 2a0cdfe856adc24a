"""Full fine-tuning of the embedded model of two directions.

torchrun --nproc_per_node 2 recipes/full_pairs_tiny.py
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.base import Full
from slicetune.recipes.models.pairs_tiny import row

CONFIG = row("full", Full(), learning_rate=3e-4)

if __name__ == "__main__":
    main(CONFIG)
