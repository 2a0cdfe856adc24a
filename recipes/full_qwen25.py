"""Full fine-tuning: Qwen2.5-7B-Instruct, German–English, Koran unseen (the paper's Table 1).

torchrun --nproc_per_node 8 recipes/full_qwen25.py --data.dir DATA --out runs/full-qwen25
python recipes/full_qwen25.py --dry-run
"""

from slicetune.engine.cli import main
from slicetune.engine.config import DataConfig, ModelConfig, RunConfig, TrainConfig, ZeroConfig
from slicetune.engine.methods.base import Full

CONFIG = RunConfig(
    out="runs/full-qwen25",
    shape="Qwen2.5-7B",
    model=ModelConfig(path="Qwen/Qwen2.5-7B-Instruct", activation_checkpointing=True),
    data=DataConfig(dir="data", pair="de-en", seen=("it", "law", "medical", "subtitles"), unseen=("koran",)),
    method=Full(),
    train=TrainConfig(learning_rate=1e-5, epochs=2, global_batch_size=5),
    zero=ZeroConfig(stage=3),
)

if __name__ == "__main__":
    main(CONFIG)
