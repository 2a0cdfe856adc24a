"""Full fine-tuning of Llama-2-7B-Chat, German–English, Koran unseen: CANEFT's Table 1.

torchrun --nproc_per_node 8 recipes/full_llama2.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.base import Full
from slicetune.recipes.models.llama2 import row

CONFIG = row("full", Full(), zero_stage=3)

if __name__ == "__main__":
    main(CONFIG)
