"""CANEFT's tables, German–English, four domains seen and the Koran unseen: what the recipes of its models share."""

from slicetune.engine.config import DataConfig, ModelConfig, RunConfig, TrainConfig, ZeroConfig
from slicetune.engine.methods.method import Method


def table_row(
    model: str,
    path: str,
    shape: str,
    name: str,
    method: Method,
    *,
    learning_rate: float = 1e-5,
    zero_stage: int = 1,
) -> RunConfig:
    """A recipe's settings; it writes to runs/<name>-<model>.

    The learning rate and the batch are the authors' program's. A baseline with another rate has a customary one.
    """
    return RunConfig(
        out=f"runs/{name}-{model}",
        shape=shape,
        model=ModelConfig(path=path),
        data=DataConfig(dir="data", pair="de-en", seen=("it", "law", "medical", "subtitles"), unseen=("koran",)),
        method=method,
        train=TrainConfig(learning_rate=learning_rate, epochs=2, global_batch_size=5),
        zero=ZeroConfig(stage=zero_stage),
    )
