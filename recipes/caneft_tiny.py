"""CANEFT on the embedded model, with the embedded corpus: what `make quickstart` runs.

torchrun --nproc_per_node 2 recipes/caneft_tiny.py
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.caneft import Caneft
from slicetune.recipes.models.tiny import row

CONFIG = row("caneft", Caneft(neuron_ratio=0.01))

if __name__ == "__main__":
    main(CONFIG)
