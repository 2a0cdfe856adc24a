"""Baichuan2-7B-Base as it is, zero-shot, ten directions: LANDeRMT's Table 1.

torchrun --nproc_per_node 8 recipes/base_baichuan2.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.base import Base
from slicetune.recipes.models.baichuan2 import untrained

CONFIG = untrained("base", Base())

if __name__ == "__main__":
    main(CONFIG)
