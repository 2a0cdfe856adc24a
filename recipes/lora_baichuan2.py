"""LoRA on the attention's input projections of Baichuan2-7B-Base, ten directions: LANDeRMT's Table 1.

torchrun --nproc_per_node 8 recipes/lora_baichuan2.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.lora import Lora
from slicetune.recipes.models.baichuan2 import row

# 50,331,648 parameters: q, k and v apart have an A each (on the packed W_pack: 33,554,432).
CONFIG = row("lora", Lora(rank=64, alpha=128, target_modules=("q_proj", "k_proj", "v_proj")))

if __name__ == "__main__":
    main(CONFIG)
