"""Zero-shot, two directions, on an embedded model that knows both.

torchrun --nproc_per_node 2 recipes/base_pairs_tiny.py
"""

from slicetune.engine.cli import main
from slicetune.engine.config import DataConfig, ModelConfig, RunConfig
from slicetune.engine.methods.base import Base

CONFIG = RunConfig(
    out="runs/base-pairs-tiny",
    model=ModelConfig(path="tiny-pairs"),
    data=DataConfig(dir="tiny", pairs=("de-en", "en-de"), prompt="short"),
    method=Base(),
)

if __name__ == "__main__":
    main(CONFIG)
