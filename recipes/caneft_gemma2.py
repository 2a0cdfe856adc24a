"""CANEFT on Gemma-2-9B-it, German–English, four domains seen, Koran unseen: named on the paper's project page.

torchrun --nproc_per_node 8 recipes/caneft_gemma2.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.caneft import Caneft
from slicetune.recipes.models.gemma2 import row

CONFIG = row("caneft", Caneft(neuron_ratio=0.01))

if __name__ == "__main__":
    main(CONFIG)
