"""Layers, an ablation of LANDeRMT, on Baichuan2-7B-Base, ten directions: whole layers, nothing routed.

torchrun --nproc_per_node 8 recipes/layers_baichuan2.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.landermt import Layers
from slicetune.recipes.models.baichuan2 import row

CONFIG = row("layers", Layers(k=4))

if __name__ == "__main__":
    main(CONFIG)
