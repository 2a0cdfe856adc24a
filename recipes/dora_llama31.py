"""DoRA r=8 on all linear layers: Llama-3.1-8B-Instruct, German–English, Koran unseen (the paper's Table 1).

torchrun --nproc_per_node 8 recipes/dora_llama31.py --data.dir DATA --out runs/dora-llama31
python recipes/dora_llama31.py --dry-run
"""

from slicetune.engine.cli import main
from slicetune.engine.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from slicetune.engine.methods.lora import Dora

CONFIG = RunConfig(
    out="runs/dora-llama31",
    shape="Llama-3.1-8B",
    model=ModelConfig(path="meta-llama/Llama-3.1-8B-Instruct"),
    data=DataConfig(dir="data", pair="de-en", seen=("it", "law", "medical", "subtitles"), unseen=("koran",)),
    method=Dora(rank=8, alpha=16),
    train=TrainConfig(learning_rate=1e-4, epochs=2, global_batch_size=5),
)

if __name__ == "__main__":
    main(CONFIG)
