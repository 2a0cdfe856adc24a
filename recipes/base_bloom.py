"""BLOOM-7b1 as it is, zero-shot, ten directions: LANDeRMT's Table 1.

torchrun --nproc_per_node 8 recipes/base_bloom.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.base import Base
from slicetune.recipes.models.bloom import untrained

CONFIG = untrained("base", Base())

if __name__ == "__main__":
    main(CONFIG)
