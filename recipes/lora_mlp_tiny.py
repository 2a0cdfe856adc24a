"""LoRA r=8 on the FFNs of the embedded model, with the embedded corpus.

torchrun --nproc_per_node 2 recipes/lora_mlp_tiny.py
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.lora import LoraMlp
from slicetune.recipes.models.tiny import row

CONFIG = row("lora-mlp", LoraMlp(rank=8, alpha=16))

if __name__ == "__main__":
    main(CONFIG)
