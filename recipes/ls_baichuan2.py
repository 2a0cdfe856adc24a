"""LS, an ablation of LANDeRMT, on Baichuan2-7B-Base, ten directions: only specific units are trained.

torchrun --nproc_per_node 8 recipes/ls_baichuan2.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.landermt import Ls
from slicetune.recipes.models.baichuan2 import row

CONFIG = row("ls", Ls(k=4, epsilon=0.9))

if __name__ == "__main__":
    main(CONFIG)
