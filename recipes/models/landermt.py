"""LANDeRMT's tables, ten directions in one run: what the recipes of its models share.

--data.dir has <pair>/wmt/{train,dev,test}.jsonl.gz of each pair. A folder de-en serves en-de too.
"""

from slicetune.engine.config import DataConfig, EvaluateConfig, ModelConfig, RunConfig, TrainConfig, ZeroConfig
from slicetune.engine.methods.method import Method

PAIRS = ("en-de", "de-en", "en-fr", "fr-en", "en-it", "it-en", "en-zh", "zh-en", "en-ar", "ar-en")


def table_row(
    model: str,
    path: str,
    shape: str,
    name: str,
    method: Method,
    *,
    zero_stage: int = 1,
) -> RunConfig:
    """A recipe's settings; it writes to runs/<name>-<model>."""
    return RunConfig(
        out=f"runs/{name}-{model}",
        shape=shape,
        model=ModelConfig(path=path),
        data=DataConfig(
            dir="data",
            pairs=PAIRS,
            seen=("wmt",),
            unseen=(),
            prompt="templates",
            train_sentences=100_000,  # of a direction: 12,500 iterations of 8
            budget="equal",
        ),
        method=method,
        train=TrainConfig(learning_rate=5e-5, weight_decay=0.01, epochs=1, global_batch_size=80, micro_batch_size=8),
        zero=ZeroConfig(stage=zero_stage),
        evaluate=EvaluateConfig(smooth="none"),
    )


def untrained_row(model: str, path: str, shape: str, name: str, method: Method, *, max_length: int = 512) -> RunConfig:
    """The same of a method that trains nothing."""
    return RunConfig(
        out=f"runs/{name}-{model}",
        shape=shape,
        model=ModelConfig(path=path),
        data=DataConfig(dir="data", pairs=PAIRS, seen=("wmt",), unseen=(), prompt="templates", max_length=max_length),
        method=method,
        evaluate=EvaluateConfig(smooth="none"),
    )
