"""LLaMA Pro, two new blocks on the embedded default: a small Llama and a corpus that are made on the spot.

torchrun --nproc_per_node 2 recipes/llama_pro_tiny.py
"""

from slicetune.engine.cli import main
from slicetune.engine.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from slicetune.engine.methods.llama_pro import LlamaPro

CONFIG = RunConfig(
    out="runs/llama-pro-tiny",
    model=ModelConfig(path="tiny"),
    data=DataConfig(dir="tiny", prompt="short", score_sentences=400, train_sentences=400),
    method=LlamaPro(blocks=2),
    train=TrainConfig(learning_rate=1e-3, epochs=2, global_batch_size=16),
)

if __name__ == "__main__":
    main(CONFIG)
