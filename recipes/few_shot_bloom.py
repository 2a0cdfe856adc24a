"""BLOOM-7b1 with five examples in its prompt, ten directions: LANDeRMT's Table 1.

torchrun --nproc_per_node 8 recipes/few_shot_bloom.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.few_shot import FewShot
from slicetune.recipes.models.bloom import untrained

CONFIG = untrained("few-shot", FewShot(shots=5), max_length=2048)

if __name__ == "__main__":
    main(CONFIG)
