"""LoRA r=8 on the FFNs: Llama-2-7B-Chat, German–English, Koran unseen (the paper's Table 1).

torchrun --nproc_per_node 8 recipes/lora_mlp_llama2.py --data.dir DATA --out runs/lora-mlp-llama2
python recipes/lora_mlp_llama2.py --dry-run
"""

from slicetune.engine.cli import main
from slicetune.engine.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from slicetune.engine.methods.lora import LoraMlp

CONFIG = RunConfig(
    out="runs/lora-mlp-llama2",
    shape="Llama-2-7B",
    model=ModelConfig(path="meta-llama/Llama-2-7b-chat-hf"),
    data=DataConfig(dir="data", pair="de-en", seen=("it", "law", "medical", "subtitles"), unseen=("koran",)),
    method=LoraMlp(rank=8, alpha=16),
    train=TrainConfig(learning_rate=1e-4, epochs=2, global_batch_size=5),
)

if __name__ == "__main__":
    main(CONFIG)
