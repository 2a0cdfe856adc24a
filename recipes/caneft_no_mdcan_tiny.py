"""CANEFT w/o MDCAN, by importance alone, on the embedded model, with the embedded corpus.

torchrun --nproc_per_node 2 recipes/caneft_no_mdcan_tiny.py
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.caneft import Caneft
from slicetune.recipes.models.tiny import row

CONFIG = row("caneft-no-mdcan", Caneft(neuron_ratio=0.01, consensus=None))

if __name__ == "__main__":
    main(CONFIG)
