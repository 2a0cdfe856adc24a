"""RCN, CANEFT's control, on Qwen2.5-7B-Instruct, German–English, Koran unseen: CANEFT's Table 1.

torchrun --nproc_per_node 8 recipes/rcn_qwen25.py --data.dir DATA
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.caneft import Rcn
from slicetune.recipes.models.qwen25 import row

# As many neurons of each projection as CANEFT chooses from the same scores, drawn at random.
CONFIG = row("rcn", Rcn(neuron_ratio=0.01))

if __name__ == "__main__":
    main(CONFIG)
