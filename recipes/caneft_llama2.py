"""CANEFT on Llama-2-7B-Chat, German–English, four domains seen, Koran unseen: the paper's Table 1.

torchrun --nproc_per_node 8 recipes/caneft_llama2.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.caneft import Caneft
from slicetune.recipes.models.llama2 import row

CONFIG = row("caneft", Caneft(neuron_ratio=0.01))

if __name__ == "__main__":
    main(CONFIG)
