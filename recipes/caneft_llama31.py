"""CANEFT on Llama-3.1-8B-Instruct, German–English, four domains seen, Koran unseen: the paper's Table 1.

torchrun --nproc_per_node 8 recipes/caneft_llama31.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.caneft import Caneft
from slicetune.recipes.models.llama31 import row

CONFIG = row("caneft", Caneft(neuron_ratio=0.01))

if __name__ == "__main__":
    main(CONFIG)
