"""LANDeRMT on the embedded model of two directions: the FFNs of two layers, routed by direction.

torchrun --nproc_per_node 2 recipes/landermt_pairs_tiny.py
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.landermt import Landermt
from slicetune.recipes.models.pairs_tiny import row

CONFIG = row("landermt", Landermt(k=2, epsilon=0.9), learning_rate=3e-4, micro_batch_size=8)

if __name__ == "__main__":
    main(CONFIG)
