"""LANDeRMT on Baichuan2-7B-Base, ten directions: the FFNs of four layers, routed by direction.

torchrun --nproc_per_node 8 recipes/landermt_baichuan2.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.landermt import Landermt
from slicetune.recipes.models.baichuan2 import row

# Four whole blocks, as the paper's count has them, are 809,533,440 parameters: --method.attention.
CONFIG = row("landermt", Landermt(k=4, epsilon=0.9))

if __name__ == "__main__":
    main(CONFIG)
