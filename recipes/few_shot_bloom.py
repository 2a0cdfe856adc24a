"""Five examples in the prompt: BLOOM-7b1, ten directions (LANDeRMT's Table 1).

DATA has <pair>/wmt/{train,dev,test}.jsonl.gz of each; a folder de-en serves en-de too.

torchrun --nproc_per_node 8 recipes/few_shot_bloom.py --data.dir DATA --out runs/few-shot-bloom
python recipes/few_shot_bloom.py --dry-run
"""

from slicetune.engine.cli import main
from slicetune.engine.config import DataConfig, EvaluateConfig, ModelConfig, RunConfig
from slicetune.engine.methods.few_shot import FewShot

CONFIG = RunConfig(
    out="runs/few-shot-bloom",
    shape="BLOOM-7b1",
    model=ModelConfig(path="bigscience/bloom-7b1"),
    data=DataConfig(
        dir="data",
        pairs=("en-de", "de-en", "en-fr", "fr-en", "en-it", "it-en", "en-zh", "zh-en", "en-ar", "ar-en"),
        seen=("wmt",),
        unseen=(),
        prompt="templates",
        max_length=2048,
    ),
    method=FewShot(),
    evaluate=EvaluateConfig(smooth="none"),
)

if __name__ == "__main__":
    main(CONFIG)
