"""The embedded model and corpus, a small Llama and five domains that are made on the spot: what its recipes share."""

from slicetune.engine.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from slicetune.engine.methods.method import Method


def row(name: str, method: Method, *, learning_rate: float = 3e-3) -> RunConfig:
    """A recipe's settings; it writes to runs/<name>-tiny."""
    return RunConfig(
        out=f"runs/{name}-tiny",
        model=ModelConfig(path="tiny"),
        data=DataConfig(dir="tiny", prompt="short", score_sentences=400, train_sentences=400),
        method=method,
        train=TrainConfig(learning_rate=learning_rate, epochs=2, global_batch_size=16),
    )


def untrained(name: str, method: Method) -> RunConfig:
    """The same of a method that trains nothing."""
    return RunConfig(
        out=f"runs/{name}-tiny",
        model=ModelConfig(path="tiny"),
        data=DataConfig(dir="tiny", prompt="short"),
        method=method,
    )
