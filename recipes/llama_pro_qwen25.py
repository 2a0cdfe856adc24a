"""LLaMA Pro, two new blocks: Qwen2.5-7B-Instruct, German–English, Koran unseen (the paper's Table 1).

torchrun --nproc_per_node 8 recipes/llama_pro_qwen25.py --data.dir DATA --out runs/llama-pro-qwen25
python recipes/llama_pro_qwen25.py --dry-run
"""

from slicetune.engine.cli import main
from slicetune.engine.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from slicetune.engine.methods.llama_pro import LlamaPro

CONFIG = RunConfig(
    out="runs/llama-pro-qwen25",
    shape="Qwen2.5-7B",
    model=ModelConfig(path="Qwen/Qwen2.5-7B-Instruct", activation_checkpointing=True),
    data=DataConfig(dir="data", pair="de-en", seen=("it", "law", "medical", "subtitles"), unseen=("koran",)),
    method=LlamaPro(blocks=2),
    train=TrainConfig(learning_rate=2e-5, epochs=2, global_batch_size=5),
)

if __name__ == "__main__":
    main(CONFIG)
