"""LoRA on the attention's input projections of BLOOM-7b1, ten directions: LANDeRMT's Table 1.

torchrun --nproc_per_node 8 recipes/lora_bloom.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.lora import Lora
from slicetune.recipes.models.bloom import row

# 31,457,280 parameters: the paper's 31 M. Its alpha is not given.
CONFIG = row("lora", Lora(rank=64, alpha=128, target_modules=("query_key_value",)))

if __name__ == "__main__":
    main(CONFIG)
