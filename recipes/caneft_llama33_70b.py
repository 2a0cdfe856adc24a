"""CANEFT on Llama-3.3-70B-Instruct, German–English, four domains seen, Koran unseen: no row of the paper.

torchrun --nproc_per_node 8 recipes/caneft_llama33_70b.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.caneft import Caneft
from slicetune.recipes.models.llama33_70b import row

CONFIG = row("caneft", Caneft(neuron_ratio=0.01))

if __name__ == "__main__":
    main(CONFIG)
