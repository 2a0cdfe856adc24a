"""LoRA r=8 on the FFNs of Llama-2-7B-Chat, German–English, Koran unseen: CANEFT's Table 1.

torchrun --nproc_per_node 8 recipes/lora_mlp_llama2.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.lora import LoraMlp
from slicetune.recipes.models.llama2 import row

CONFIG = row("lora-mlp", LoraMlp(rank=8, alpha=16), learning_rate=1e-4)

if __name__ == "__main__":
    main(CONFIG)
