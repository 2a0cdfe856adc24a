"""Full fine-tuning on the embedded default: a small Llama and a corpus that are made on the spot.

torchrun --nproc_per_node 2 recipes/full_tiny.py
"""

from slicetune.engine.cli import main
from slicetune.engine.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from slicetune.engine.methods.base import Full

CONFIG = RunConfig(
    out="runs/full-tiny",
    model=ModelConfig(path="tiny"),
    data=DataConfig(dir="tiny", prompt="short", score_sentences=400, train_sentences=400),
    method=Full(),
    train=TrainConfig(learning_rate=3e-4, epochs=2, global_batch_size=16),
)

if __name__ == "__main__":
    main(CONFIG)
