"""CANEFT w/o MDCAN, by importance alone on the embedded default: a small Llama and a corpus that are made on the spot.

torchrun --nproc_per_node 2 recipes/caneft_no_mdcan_tiny.py
"""

from slicetune.engine.cli import main
from slicetune.engine.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from slicetune.engine.methods.caneft import Caneft

CONFIG = RunConfig(
    out="runs/caneft-no-mdcan-tiny",
    model=ModelConfig(path="tiny"),
    data=DataConfig(dir="tiny", prompt="short", score_sentences=400, train_sentences=400),
    method=Caneft(neuron_ratio=0.01, consensus=None),
    train=TrainConfig(learning_rate=3e-3, epochs=2, global_batch_size=16),
)

if __name__ == "__main__":
    main(CONFIG)
