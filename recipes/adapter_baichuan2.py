"""Bottleneck adapters on Baichuan2-7B-Base, ten directions: LANDeRMT's Table 1.

torchrun --nproc_per_node 8 recipes/adapter_baichuan2.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.adapter import Adapter
from slicetune.recipes.models.baichuan2 import row

# 860,199,424 parameters: 32 layers where BLOOM has 30.
CONFIG = row("adapter", Adapter(width=1640))

if __name__ == "__main__":
    main(CONFIG)
