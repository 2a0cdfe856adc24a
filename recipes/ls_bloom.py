"""LS, an ablation of LANDeRMT, on BLOOM-7b1, ten directions: only specific units are trained.

torchrun --nproc_per_node 8 recipes/ls_bloom.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.landermt import Ls
from slicetune.recipes.models.bloom import row

CONFIG = row("ls", Ls(k=4, epsilon=0.9))

if __name__ == "__main__":
    main(CONFIG)
