"""Layers, an ablation of LANDeRMT, two directions, on an embedded model that knows both: whole layers, nothing routed.

torchrun --nproc_per_node 2 recipes/layers_pairs_tiny.py
"""

from slicetune.engine.cli import main
from slicetune.engine.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from slicetune.engine.methods.landermt import Layers

CONFIG = RunConfig(
    out="runs/layers-pairs-tiny",
    model=ModelConfig(path="tiny-pairs"),
    data=DataConfig(
        dir="tiny", pairs=("de-en", "en-de"), prompt="short", score_sentences=400, train_sentences=400, budget="equal"
    ),
    method=Layers(k=2),
    train=TrainConfig(learning_rate=3e-4, epochs=2, global_batch_size=16, micro_batch_size=8),
)

if __name__ == "__main__":
    main(CONFIG)
