"""The base model as it is: Llama-3.1-8B-Instruct, German–English, Koran unseen (the paper's Table 1, first row).

torchrun --nproc_per_node 8 recipes/base_llama31.py --data.dir DATA --out runs/base-llama31
python recipes/base_llama31.py --dry-run
"""

from slicetune.engine.cli import main
from slicetune.engine.config import DataConfig, ModelConfig, RunConfig
from slicetune.engine.methods.base import Base

CONFIG = RunConfig(
    out="runs/base-llama31",
    shape="Llama-3.1-8B",
    model=ModelConfig(path="meta-llama/Llama-3.1-8B-Instruct"),
    data=DataConfig(dir="data", pair="de-en", seen=("it", "law", "medical", "subtitles"), unseen=("koran",)),
    method=Base(),
)

if __name__ == "__main__":
    main(CONFIG)
