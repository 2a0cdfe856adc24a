"""LoRA r=8 on all linear layers of Qwen2.5-7B-Instruct, German–English, Koran unseen: CANEFT's Table 1.

torchrun --nproc_per_node 8 recipes/lora_qwen25.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.lora import Lora
from slicetune.recipes.models.qwen25 import row

CONFIG = row("lora", Lora(rank=8, alpha=16), learning_rate=1e-4)

if __name__ == "__main__":
    main(CONFIG)
