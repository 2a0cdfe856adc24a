"""RCN, CANEFT's control: Qwen2.5-7B-Instruct, German–English, Koran unseen (the paper's Table 1).

As many neurons of each projection as CANEFT chooses from the same scores, drawn at random.

torchrun --nproc_per_node 8 recipes/rcn_qwen25.py --data.dir DATA --out runs/rcn-qwen25
python recipes/rcn_qwen25.py --dry-run
"""

from slicetune.engine.cli import main
from slicetune.engine.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from slicetune.engine.methods.caneft import Rcn

CONFIG = RunConfig(
    out="runs/rcn-qwen25",
    shape="Qwen2.5-7B",
    model=ModelConfig(path="Qwen/Qwen2.5-7B-Instruct"),
    data=DataConfig(dir="data", pair="de-en", seen=("it", "law", "medical", "subtitles"), unseen=("koran",)),
    method=Rcn(neuron_ratio=0.01),
    train=TrainConfig(learning_rate=1e-5, epochs=2, global_batch_size=5),
)

if __name__ == "__main__":
    main(CONFIG)
