"""CANEFT w/o MDMTN, no task filter, on the embedded model, with the embedded corpus.

torchrun --nproc_per_node 2 recipes/caneft_no_mdmtn_tiny.py
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.caneft import Caneft
from slicetune.recipes.models.tiny import row

CONFIG = row("caneft-no-mdmtn", Caneft(neuron_ratio=0.01, task_ratio=None))

if __name__ == "__main__":
    main(CONFIG)
