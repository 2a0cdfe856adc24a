"""LAPE on the embedded default: a small Llama and a corpus that are made on the spot.

--method.match runs/caneft-tiny/neurons.safetensors trains as many parameters as that run.

torchrun --nproc_per_node 2 recipes/lape_tiny.py
"""

from slicetune.engine.cli import main
from slicetune.engine.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from slicetune.engine.methods.lape import Lape

CONFIG = RunConfig(
    out="runs/lape-tiny",
    model=ModelConfig(path="tiny"),
    data=DataConfig(dir="tiny", prompt="short", score_sentences=400, train_sentences=400),
    method=Lape(neuron_ratio=0.01),
    train=TrainConfig(learning_rate=3e-3, epochs=2, global_batch_size=16),
)

if __name__ == "__main__":
    main(CONFIG)
