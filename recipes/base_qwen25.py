"""The base model as it is: Qwen2.5-7B-Instruct, German–English, Koran unseen (the paper's Table 1, first row).

torchrun --nproc_per_node 8 recipes/base_qwen25.py --data.dir DATA --out runs/base-qwen25
python recipes/base_qwen25.py --dry-run
"""

from slicetune.engine.cli import main
from slicetune.engine.config import DataConfig, ModelConfig, RunConfig
from slicetune.engine.methods.base import Base

CONFIG = RunConfig(
    out="runs/base-qwen25",
    shape="Qwen2.5-7B",
    model=ModelConfig(path="Qwen/Qwen2.5-7B-Instruct"),
    data=DataConfig(dir="data", pair="de-en", seen=("it", "law", "medical", "subtitles"), unseen=("koran",)),
    method=Base(),
)

if __name__ == "__main__":
    main(CONFIG)
