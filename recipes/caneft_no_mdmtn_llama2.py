"""CANEFT w/o MDMTN, no task filter, on Llama-2-7B-Chat, German–English, Koran unseen: the paper's Table 2.

torchrun --nproc_per_node 8 recipes/caneft_no_mdmtn_llama2.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.caneft import Caneft
from slicetune.recipes.models.llama2 import row

CONFIG = row("caneft-no-mdmtn", Caneft(neuron_ratio=0.01, task_ratio=None))

if __name__ == "__main__":
    main(CONFIG)
