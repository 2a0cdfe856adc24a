"""Bottleneck adapters and LoRA, two directions, on an embedded model that knows both.

torchrun --nproc_per_node 2 recipes/adapter_lora_pairs_tiny.py
"""

from slicetune.engine.cli import main
from slicetune.engine.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from slicetune.engine.methods.adapter import AdapterLora

CONFIG = RunConfig(
    out="runs/adapter-lora-pairs-tiny",
    model=ModelConfig(path="tiny-pairs"),
    data=DataConfig(
        dir="tiny", pairs=("de-en", "en-de"), prompt="short", score_sentences=400, train_sentences=400, budget="equal"
    ),
    method=AdapterLora(width=16, rank=8, alpha=16, target_modules=("q_proj", "k_proj", "v_proj")),
    train=TrainConfig(learning_rate=3e-3, epochs=2, global_batch_size=16),
)

if __name__ == "__main__":
    main(CONFIG)
