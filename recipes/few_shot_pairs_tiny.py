"""The base model with five examples in its prompt, two directions, on an embedded model that knows both.

It shows the program at work, not what examples are good for: a model this small has never read more than one turn.

torchrun --nproc_per_node 2 recipes/few_shot_pairs_tiny.py
"""

from slicetune.engine.cli import main
from slicetune.engine.config import DataConfig, ModelConfig, RunConfig
from slicetune.engine.methods.few_shot import FewShot

CONFIG = RunConfig(
    out="runs/few-shot-pairs-tiny",
    model=ModelConfig(path="tiny-pairs"),
    data=DataConfig(dir="tiny", pairs=("de-en", "en-de"), prompt="short"),
    method=FewShot(),
)

if __name__ == "__main__":
    main(CONFIG)
