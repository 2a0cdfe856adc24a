"""The base model as it is on the embedded default: a small Llama and a corpus that are made on the spot.

torchrun --nproc_per_node 2 recipes/base_tiny.py
"""

from slicetune.engine.cli import main
from slicetune.engine.config import DataConfig, ModelConfig, RunConfig
from slicetune.engine.methods.base import Base

CONFIG = RunConfig(
    out="runs/base-tiny",
    model=ModelConfig(path="tiny"),
    data=DataConfig(dir="tiny", prompt="short"),
    method=Base(),
)

if __name__ == "__main__":
    main(CONFIG)
