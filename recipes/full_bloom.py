"""Full fine-tuning of BLOOM-7b1, ten directions: LANDeRMT's Table 1.

torchrun --nproc_per_node 8 recipes/full_bloom.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.base import Full
from slicetune.recipes.models.bloom import row

CONFIG = row("full", Full(), zero_stage=3)

if __name__ == "__main__":
    main(CONFIG)
