"""CANEFT w/o MDMTN, no task filter, on Llama-3.1-8B-Instruct, German–English, Koran unseen: the paper's Table 2.

torchrun --nproc_per_node 8 recipes/caneft_no_mdmtn_llama31.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.caneft import Caneft
from slicetune.recipes.models.llama31 import row

CONFIG = row("caneft-no-mdmtn", Caneft(neuron_ratio=0.01, task_ratio=None))

if __name__ == "__main__":
    main(CONFIG)
