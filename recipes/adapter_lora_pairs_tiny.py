"""Bottleneck adapters and LoRA on the embedded model of two directions.

torchrun --nproc_per_node 2 recipes/adapter_lora_pairs_tiny.py
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.adapter import AdapterLora
from slicetune.recipes.models.pairs_tiny import row

CONFIG = row("adapter-lora", AdapterLora(width=16, rank=8, alpha=16, target_modules=("q_proj", "k_proj", "v_proj")))

if __name__ == "__main__":
    main(CONFIG)
