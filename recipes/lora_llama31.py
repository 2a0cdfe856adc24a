"""LoRA r=8 on all linear layers of Llama-3.1-8B-Instruct, German–English, Koran unseen: CANEFT's Table 1.

torchrun --nproc_per_node 8 recipes/lora_llama31.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.lora import Lora
from slicetune.recipes.models.llama31 import row

# The paper's count of this row is that of r=16; the dry run prints that of r=8.
CONFIG = row("lora", Lora(rank=8, alpha=16), learning_rate=1e-4)

if __name__ == "__main__":
    main(CONFIG)
