"""Qwen2.5-7B-Instruct, German–English, as in CANEFT's tables: what its recipes share."""

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
    """A recipe's settings; it writes to runs/<name>-qwen25.

    The learning rate and the batch are the authors' program's. A baseline with another rate has a customary one.
    """
    return RunConfig(
        out=f"runs/{name}-qwen25",
        shape="Qwen2.5-7B",
        model=ModelConfig(path="Qwen/Qwen2.5-7B-Instruct", activation_checkpointing=activation_checkpointing),
        data=DataConfig(dir="data", pair="de-en", seen=("it", "law", "medical", "subtitles"), unseen=("koran",)),
        method=method,
        train=TrainConfig(learning_rate=learning_rate, epochs=2, global_batch_size=5),
        zero=ZeroConfig(stage=zero_stage),
    )
