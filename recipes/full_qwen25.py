"""Full fine-tuning of Qwen2.5-7B-Instruct, German–English, Koran unseen: CANEFT's Table 1.

torchrun --nproc_per_node 8 recipes/full_qwen25.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.base import Full
from slicetune.recipes.models.qwen25 import row

CONFIG = row("full", Full(), zero_stage=3)

if __name__ == "__main__":
    main(CONFIG)
