"""Five examples in the prompt: Baichuan2-7B-Base, ten directions (LANDeRMT's Table 1).

DATA has <pair>/wmt/{train,dev,test}.jsonl.gz of each; a folder de-en serves en-de too.

torchrun --nproc_per_node 8 recipes/few_shot_baichuan2.py --data.dir DATA --out runs/few-shot-baichuan2
python recipes/few_shot_baichuan2.py --dry-run
"""

from slicetune.engine.cli import main
from slicetune.engine.config import DataConfig, EvaluateConfig, ModelConfig, RunConfig
from slicetune.engine.methods.few_shot import FewShot

CONFIG = RunConfig(
    out="runs/few-shot-baichuan2",
    shape="Baichuan2-7B",
    model=ModelConfig(path="baichuan-inc/Baichuan2-7B-Base"),
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
