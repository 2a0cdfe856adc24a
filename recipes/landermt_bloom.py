"""LANDeRMT on BLOOM-7b1, ten directions: the FFNs of four layers, routed by direction.

torchrun --nproc_per_node 8 recipes/landermt_bloom.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.landermt import Landermt
from slicetune.recipes.models.bloom import row

# The paper's 805 M are four whole blocks, 805,519,360 parameters: --method.attention.
CONFIG = row("landermt", Landermt(k=4, epsilon=0.9))

if __name__ == "__main__":
    main(CONFIG)
