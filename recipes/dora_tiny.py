"""DoRA r=8 on all linear layers of the embedded model, with the embedded corpus.

torchrun --nproc_per_node 2 recipes/dora_tiny.py
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.lora import Dora
from slicetune.recipes.models.tiny import row

CONFIG = row("dora", Dora(rank=8, alpha=16))

if __name__ == "__main__":
    main(CONFIG)
