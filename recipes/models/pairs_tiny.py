"""An embedded model that knows two directions, and the embedded corpus: what its recipes share."""

from slicetune.engine.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from slicetune.engine.methods.method import Method

PAIRS = ("de-en", "en-de")


def row(name: str, method: Method, *, learning_rate: float = 3e-3, micro_batch_size: int = 0) -> RunConfig:
    """A recipe's settings; it writes to runs/<name>-pairs-tiny."""
    return RunConfig(
        out=f"runs/{name}-pairs-tiny",
        model=ModelConfig(path="tiny-pairs"),
        data=DataConfig(
            dir="tiny", pairs=PAIRS, prompt="short", score_sentences=400, train_sentences=400, budget="equal"
        ),
        method=method,
        train=TrainConfig(
            learning_rate=learning_rate, epochs=2, global_batch_size=16, micro_batch_size=micro_batch_size
        ),
    )


def untrained(name: str, method: Method) -> RunConfig:
    """The same of a method that trains nothing."""
    return RunConfig(
        out=f"runs/{name}-pairs-tiny",
        model=ModelConfig(path="tiny-pairs"),
        data=DataConfig(dir="tiny", pairs=PAIRS, prompt="short"),
        method=method,
    )
