"""LLaMA Pro with two new blocks on the embedded model, with the embedded corpus.

torchrun --nproc_per_node 2 recipes/llama_pro_tiny.py
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.llama_pro import LlamaPro
from slicetune.recipes.models.tiny import row

CONFIG = row("llama-pro", LlamaPro(blocks=2), learning_rate=1e-3)

if __name__ == "__main__":
    main(CONFIG)
