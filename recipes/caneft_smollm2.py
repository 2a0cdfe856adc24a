"""CANEFT on SmolLM2-135M-Instruct, a real pretrained model for a laptop: 1 % of its neurons, the embedded corpus.

torchrun --nproc_per_node 1 recipes/caneft_smollm2.py
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.caneft import Caneft
from slicetune.recipes.models.smollm2 import row

CONFIG = row("caneft", Caneft(neuron_ratio=0.01))

if __name__ == "__main__":
    main(CONFIG)
