"""Bottleneck adapters and LoRA: BLOOM-7b1, ten directions (LANDeRMT's Table 1).

806,433,120 parameters: the paper's 806 M. Width and rank are a guess that meets it.
DATA has <pair>/wmt/{train,dev,test}.jsonl.gz of each; a folder de-en serves en-de too.

torchrun --nproc_per_node 8 recipes/adapter_lora_bloom.py --data.dir DATA --out runs/adapter-lora-bloom
python recipes/adapter_lora_bloom.py --dry-run
"""

from slicetune.engine.cli import main
from slicetune.engine.config import DataConfig, EvaluateConfig, ModelConfig, RunConfig, TrainConfig
from slicetune.engine.methods.adapter import AdapterLora

CONFIG = RunConfig(
    out="runs/adapter-lora-bloom",
    shape="BLOOM-7b1",
    model=ModelConfig(path="bigscience/bloom-7b1"),
    data=DataConfig(
        dir="data",
        pairs=("en-de", "de-en", "en-fr", "fr-en", "en-it", "it-en", "en-zh", "zh-en", "en-ar", "ar-en"),
        seen=("wmt",),
        unseen=(),
        prompt="templates",
        train_sentences=100_000,
        budget="equal",
    ),
    method=AdapterLora(width=1576, rank=64, alpha=128),
    train=TrainConfig(learning_rate=5e-5, weight_decay=0.01, epochs=1, global_batch_size=80, micro_batch_size=8),
    evaluate=EvaluateConfig(smooth="none"),
)

if __name__ == "__main__":
    main(CONFIG)
