"""Bottleneck adapters, two directions, on an embedded model that knows both.

torchrun --nproc_per_node 2 recipes/adapter_pairs_tiny.py
"""

from slicetune.engine.cli import main
from slicetune.engine.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from slicetune.engine.methods.adapter import Adapter

CONFIG = RunConfig(
    out="runs/adapter-pairs-tiny",
    model=ModelConfig(path="tiny-pairs"),
    data=DataConfig(
        dir="tiny", pairs=("de-en", "en-de"), prompt="short", score_sentences=400, train_sentences=400, budget="equal"
    ),
    method=Adapter(width=24),
    train=TrainConfig(learning_rate=3e-3, epochs=2, global_batch_size=16),
)

if __name__ == "__main__":
    main(CONFIG)
