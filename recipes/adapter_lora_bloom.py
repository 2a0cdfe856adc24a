"""Bottleneck adapters and LoRA on BLOOM-7b1, ten directions: LANDeRMT's Table 1.

torchrun --nproc_per_node 8 recipes/adapter_lora_bloom.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.adapter import AdapterLora
from slicetune.recipes.models.bloom import row

# 806,433,120 parameters: the paper's 806 M. Width and rank are a guess that meets it.
CONFIG = row("adapter-lora", AdapterLora(width=1576, rank=64, alpha=128))

if __name__ == "__main__":
    main(CONFIG)
