"""Llama-3.1-8B-Instruct as it is, German–English, Koran unseen: CANEFT's Table 1, first row.

torchrun --nproc_per_node 8 recipes/base_llama31.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.base import Base
from slicetune.recipes.models.llama31 import row

CONFIG = row("base", Base())

if __name__ == "__main__":
    main(CONFIG)
