"""RCN, CANEFT's control: Llama-3.1-8B-Instruct, German–English, Koran unseen (the paper's Table 1).

As many neurons of each projection as CANEFT chooses from the same scores, drawn at random.

torchrun --nproc_per_node 8 recipes/rcn_llama31.py --data.dir DATA --out runs/rcn-llama31
python recipes/rcn_llama31.py --dry-run
"""

from slicetune.engine.cli import main
from slicetune.engine.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from slicetune.engine.methods.caneft import Rcn

CONFIG = RunConfig(
    out="runs/rcn-llama31",
    shape="Llama-3.1-8B",
    model=ModelConfig(path="meta-llama/Llama-3.1-8B-Instruct"),
    data=DataConfig(dir="data", pair="de-en", seen=("it", "law", "medical", "subtitles"), unseen=("koran",)),
    method=Rcn(neuron_ratio=0.01),
    train=TrainConfig(learning_rate=1e-5, epochs=2, global_batch_size=5),
)

if __name__ == "__main__":
    main(CONFIG)
