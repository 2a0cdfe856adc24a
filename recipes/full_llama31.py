"""Full fine-tuning: Llama-3.1-8B-Instruct, German–English, Koran unseen (the paper's Table 1).

torchrun --nproc_per_node 8 recipes/full_llama31.py --data.dir DATA --out runs/full-llama31
python recipes/full_llama31.py --dry-run
"""

from slicetune.engine.cli import main
from slicetune.engine.config import DataConfig, ModelConfig, RunConfig, TrainConfig, ZeroConfig
from slicetune.engine.methods.base import Full

CONFIG = RunConfig(
    out="runs/full-llama31",
    shape="Llama-3.1-8B",
    model=ModelConfig(path="meta-llama/Llama-3.1-8B-Instruct", activation_checkpointing=True),
    data=DataConfig(dir="data", pair="de-en", seen=("it", "law", "medical", "subtitles"), unseen=("koran",)),
    method=Full(),
    train=TrainConfig(learning_rate=1e-5, epochs=2, global_batch_size=5),
    zero=ZeroConfig(stage=3),
)

if __name__ == "__main__":
    main(CONFIG)
