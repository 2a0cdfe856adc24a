"""The base model as it is: Llama-2-7B-Chat, German–English, Koran unseen (the paper's Table 1, first row).

torchrun --nproc_per_node 8 recipes/base_llama2.py --data.dir DATA --out runs/base-llama2
python recipes/base_llama2.py --dry-run
"""

from slicetune.engine.cli import main
from slicetune.engine.config import DataConfig, ModelConfig, RunConfig
from slicetune.engine.methods.base import Base

CONFIG = RunConfig(
    out="runs/base-llama2",
    shape="Llama-2-7B",
    model=ModelConfig(path="meta-llama/Llama-2-7b-chat-hf"),
    data=DataConfig(dir="data", pair="de-en", seen=("it", "law", "medical", "subtitles"), unseen=("koran",)),
    method=Base(),
)

if __name__ == "__main__":
    main(CONFIG)
