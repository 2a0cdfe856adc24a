"""CANEFT on Gemma-2-9B-it, German–English: four domains seen, Koran unseen (named on the paper's project page).

torchrun --nproc_per_node 8 recipes/caneft_gemma2.py --data.dir DATA --out runs/caneft-gemma2
python recipes/caneft_gemma2.py --dry-run
"""

from slicetune.engine.cli import main
from slicetune.engine.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from slicetune.engine.methods.caneft import Caneft

CONFIG = RunConfig(
    out="runs/caneft-gemma2",
    shape="Gemma-2-9B",
    model=ModelConfig(path="google/gemma-2-9b-it"),
    data=DataConfig(dir="data", pair="de-en", seen=("it", "law", "medical", "subtitles"), unseen=("koran",)),
    method=Caneft(neuron_ratio=0.01),
    train=TrainConfig(learning_rate=1e-5, epochs=2, global_batch_size=5),
)

if __name__ == "__main__":
    main(CONFIG)
