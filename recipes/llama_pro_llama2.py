"""LLaMA Pro with two new blocks on Llama-2-7B-Chat, German–English, Koran unseen: CANEFT's Table 1.

torchrun --nproc_per_node 8 recipes/llama_pro_llama2.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.llama_pro import LlamaPro
from slicetune.recipes.models.llama2 import row

CONFIG = row("llama-pro", LlamaPro(blocks=2), learning_rate=2e-5)

if __name__ == "__main__":
    main(CONFIG)
