"""LAPE on the embedded model, with the embedded corpus.

torchrun --nproc_per_node 2 recipes/lape_tiny.py
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.lape import Lape
from slicetune.recipes.models.tiny import row

# --method.match runs/caneft-tiny/neurons.safetensors trains as many parameters as that run.
CONFIG = row("lape", Lape(neuron_ratio=0.01))

if __name__ == "__main__":
    main(CONFIG)
