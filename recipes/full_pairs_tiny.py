"""Full fine-tuning, two directions, on an embedded model that knows both.

torchrun --nproc_per_node 2 recipes/full_pairs_tiny.py
"""

from slicetune.engine.cli import main
from slicetune.engine.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from slicetune.engine.methods.base import Full

CONFIG = RunConfig(
    out="runs/full-pairs-tiny",
    model=ModelConfig(path="tiny-pairs"),
    data=DataConfig(
        dir="tiny", pairs=("de-en", "en-de"), prompt="short", score_sentences=400, train_sentences=400, budget="equal"
    ),
    method=Full(),
    train=TrainConfig(learning_rate=3e-4, epochs=2, global_batch_size=16),
)

if __name__ == "__main__":
    main(CONFIG)
