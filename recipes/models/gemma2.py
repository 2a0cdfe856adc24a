"""Gemma-2-9B-it, German–English, named on CANEFT's project page: what its recipes share."""

from slicetune.engine.config import DataConfig, ModelConfig, RunConfig, TrainConfig, ZeroConfig
from slicetune.engine.methods.method import Method


def row(
    name: str,
    method: Method,
    *,
    learning_rate: float = 1e-5,
    zero_stage: int = 1,
    activation_checkpointing: bool = False,
) -> RunConfig:
    """A recipe's settings; it writes to runs/<name>-gemma2.

    The learning rate and the batch are the authors' program's. A baseline with another rate has a customary one.
    """
    return RunConfig(
        out=f"runs/{name}-gemma2",
        shape="Gemma-2-9B",
        model=ModelConfig(path="google/gemma-2-9b-it", activation_checkpointing=activation_checkpointing),
        data=DataConfig(dir="data", pair="de-en", seen=("it", "law", "medical", "subtitles"), unseen=("koran",)),
        method=method,
        train=TrainConfig(learning_rate=learning_rate, epochs=2, global_batch_size=5),
        zero=ZeroConfig(stage=zero_stage),
    )
