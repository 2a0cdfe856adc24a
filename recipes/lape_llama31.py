"""LAPE on Llama-3.1-8B-Instruct, German–English, Koran unseen: CANEFT's Table 1.

torchrun --nproc_per_node 8 recipes/lape_llama31.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.lape import Lape
from slicetune.recipes.models.llama31 import row

# --method.match runs/caneft-llama31/neurons.safetensors trains as many parameters as that run.
CONFIG = row("lape", Lape(neuron_ratio=0.01))

if __name__ == "__main__":
    main(CONFIG)
