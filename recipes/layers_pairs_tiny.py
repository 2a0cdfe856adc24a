"""Layers, an ablation of LANDeRMT, on the embedded model of two directions: whole layers, nothing routed.

torchrun --nproc_per_node 2 recipes/layers_pairs_tiny.py
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.landermt import Layers
from slicetune.recipes.models.pairs_tiny import row

CONFIG = row("layers", Layers(k=2), learning_rate=3e-4, micro_batch_size=8)

if __name__ == "__main__":
    main(CONFIG)
