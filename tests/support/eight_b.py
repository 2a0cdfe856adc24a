"""The 8B that dry runs are counted for, and its recipe's settings (test_settle.py, test_fit.py)."""

from slicetune.engine.data.config import DataConfig
from slicetune.engine.models.config import ModelConfig
from slicetune.engine.models.shapes import known
from slicetune.engine.run.config import RunConfig
from slicetune.engine.training.config import TrainConfig

GIGA = 10**9
LLAMA8, LLAMA70 = known("Llama-3.1-8B"), known("Llama-3.3-70B")


def config(kind: str = "none", length: int = 512, **fields) -> RunConfig:
    """The 8B's recipe: 5 sentences an update."""
    usual = {
        "data": DataConfig(dir="no-such-corpus", max_length=length),
        "model": ModelConfig(quantize=kind, partition="off"),
        "train": TrainConfig(global_batch_size=5),
    }
    return RunConfig(**usual | fields)
