"""The embedded model as it is, on the embedded corpus.

torchrun --nproc_per_node 2 recipes/base_tiny.py
"""

from slicetune.engine.cli import main
from slicetune.engine.methods.base import Base
from slicetune.recipes.models.tiny import untrained

CONFIG = untrained("base", Base())

if __name__ == "__main__":
    main(CONFIG)
