"""Bottleneck adapters on BLOOM-7b1, ten directions: LANDeRMT's Table 1.

torchrun --nproc_per_node 8 recipes/adapter_bloom.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.adapter import Adapter
from slicetune.recipes.models.bloom import row

# 806,436,960 parameters: the paper's 806 M.
CONFIG = row("adapter", Adapter(width=1640))

if __name__ == "__main__":
    main(CONFIG)
