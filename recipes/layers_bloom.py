"""Layers, an ablation of LANDeRMT, on BLOOM-7b1, ten directions: whole layers, nothing routed.

torchrun --nproc_per_node 8 recipes/layers_bloom.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.landermt import Layers
from slicetune.recipes.models.bloom import row

CONFIG = row("layers", Layers(k=4))

if __name__ == "__main__":
    main(CONFIG)
