"""RCN, CANEFT's control, on the embedded model, with the embedded corpus.

torchrun --nproc_per_node 2 recipes/rcn_tiny.py
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.caneft import Rcn
from slicetune.recipes.models.tiny import row

# As many neurons of each projection as CANEFT chooses from the same scores, drawn at random.
CONFIG = row("rcn", Rcn(neuron_ratio=0.01))

if __name__ == "__main__":
    main(CONFIG)
