"""LG, an ablation of LANDeRMT, on BLOOM-7b1, ten directions: only general units are trained.

torchrun --nproc_per_node 8 recipes/lg_bloom.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.landermt import Lg
from slicetune.recipes.models.bloom import row

CONFIG = row("lg", Lg(k=4, epsilon=0.9))

if __name__ == "__main__":
    main(CONFIG)
