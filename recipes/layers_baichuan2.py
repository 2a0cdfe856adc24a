"""Layers, an ablation of LANDeRMT: Baichuan2-7B-Base, ten directions; whole layers, nothing routed.

DATA has <pair>/wmt/{train,dev,test}.jsonl.gz of each; a folder de-en serves en-de too.

torchrun --nproc_per_node 8 recipes/layers_baichuan2.py --data.dir DATA --out runs/layers-baichuan2
python recipes/layers_baichuan2.py --dry-run
"""

from slicetune.engine.cli import main
from slicetune.engine.config import DataConfig, EvaluateConfig, ModelConfig, RunConfig, TrainConfig
from slicetune.engine.methods.landermt import Layers

CONFIG = RunConfig(
    out="runs/layers-baichuan2",
    shape="Baichuan2-7B",
    model=ModelConfig(path="baichuan-inc/Baichuan2-7B-Base"),
    data=DataConfig(
        dir="data",
        pairs=("en-de", "de-en", "en-fr", "fr-en", "en-it", "it-en", "en-zh", "zh-en", "en-ar", "ar-en"),
        seen=("wmt",),
        unseen=(),
        prompt="templates",
        train_sentences=100_000,
        budget="equal",
    ),
    method=Layers(),
    train=TrainConfig(learning_rate=5e-5, weight_decay=0.01, epochs=1, global_batch_size=80, micro_batch_size=8),
    evaluate=EvaluateConfig(smooth="none"),
)

if __name__ == "__main__":
    main(CONFIG)
