"""Full fine-tuning of the embedded model, with the embedded corpus.

torchrun --nproc_per_node 2 recipes/full_tiny.py
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.base import Full
from slicetune.recipes.models.tiny import row

CONFIG = row("full", Full(), learning_rate=3e-4)

if __name__ == "__main__":
    main(CONFIG)
