"""The embedded model of two directions with five examples in its prompt.

torchrun --nproc_per_node 2 recipes/few_shot_pairs_tiny.py
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.few_shot import FewShot
from slicetune.recipes.models.pairs_tiny import untrained

# It shows the program at work, not what examples are good for: this model has never read more than one turn.
CONFIG = untrained("few-shot", FewShot(shots=5))

if __name__ == "__main__":
    main(CONFIG)
