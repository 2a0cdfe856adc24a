"""LoRA on the attention's input projections of the embedded model of two directions.

torchrun --nproc_per_node 2 recipes/lora_pairs_tiny.py
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.lora import Lora
from slicetune.recipes.models.pairs_tiny import row

CONFIG = row("lora", Lora(rank=8, alpha=16, target_modules=("q_proj", "k_proj", "v_proj")))

if __name__ == "__main__":
    main(CONFIG)
