"""Full fine-tuning: Llama-2-7B-Chat, German–English, Koran unseen (the paper's Table 1).

torchrun --nproc_per_node 8 recipes/full_llama2.py --data.dir DATA --out runs/full-llama2
python recipes/full_llama2.py --dry-run
"""

from slicetune.engine.cli import main
from slicetune.engine.config import DataConfig, ModelConfig, RunConfig, TrainConfig, ZeroConfig
from slicetune.engine.methods.base import Full

CONFIG = RunConfig(
    out="runs/full-llama2",
    shape="Llama-2-7B",
    model=ModelConfig(path="meta-llama/Llama-2-7b-chat-hf", activation_checkpointing=True),
    data=DataConfig(dir="data", pair="de-en", seen=("it", "law", "medical", "subtitles"), unseen=("koran",)),
    method=Full(),
    train=TrainConfig(learning_rate=1e-5, epochs=2, global_batch_size=5),
    zero=ZeroConfig(stage=3),
)

if __name__ == "__main__":
    main(CONFIG)
