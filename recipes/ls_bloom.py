"""LS, an ablation of LANDeRMT: BLOOM-7b1, ten directions; only specific units are trained.

DATA has <pair>/wmt/{train,dev,test}.jsonl.gz of each; a folder de-en serves en-de too.

torchrun --nproc_per_node 8 recipes/ls_bloom.py --data.dir DATA --out runs/ls-bloom
python recipes/ls_bloom.py --dry-run
"""

from slicetune.engine.cli import main
from slicetune.engine.config import DataConfig, EvaluateConfig, ModelConfig, RunConfig, TrainConfig
from slicetune.engine.methods.landermt import Ls

CONFIG = RunConfig(
    out="runs/ls-bloom",
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
    method=Ls(),
    train=TrainConfig(learning_rate=5e-5, weight_decay=0.01, epochs=1, global_batch_size=80, micro_batch_size=8),
    evaluate=EvaluateConfig(smooth="none"),
)

if __name__ == "__main__":
    main(CONFIG)
