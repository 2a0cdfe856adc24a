"""Bottleneck adapters and LoRA on Baichuan2-7B-Base, ten directions: LANDeRMT's Table 1.

torchrun --nproc_per_node 8 recipes/adapter_lora_baichuan2.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.adapter import AdapterLora
from slicetune.recipes.models.baichuan2 import row

# 876,972,544 parameters: BLOOM's settings, which are a guess, on 32 layers with q, k and v apart.
CONFIG = row("adapter-lora", AdapterLora(width=1576, rank=64, alpha=128, target_modules=("q_proj", "k_proj", "v_proj")))

if __name__ == "__main__":
    main(CONFIG)
