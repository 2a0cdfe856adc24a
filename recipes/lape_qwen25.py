"""LAPE on Qwen2.5-7B-Instruct, German–English, Koran unseen: CANEFT's Table 1.

torchrun --nproc_per_node 8 recipes/lape_qwen25.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.lape import Lape
from slicetune.recipes.models.qwen25 import row

# --method.match runs/caneft-qwen25/neurons.safetensors trains as many parameters as that run.
CONFIG = row("lape", Lape(neuron_ratio=0.01))

if __name__ == "__main__":
    main(CONFIG)
