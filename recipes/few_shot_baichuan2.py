"""Baichuan2-7B-Base with five examples in its prompt, ten directions: LANDeRMT's Table 1.

torchrun --nproc_per_node 8 recipes/few_shot_baichuan2.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.few_shot import FewShot
from slicetune.recipes.models.baichuan2 import untrained

CONFIG = untrained("few-shot", FewShot(shots=5), max_length=2048)

if __name__ == "__main__":
    main(CONFIG)
