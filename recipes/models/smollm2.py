"""SmolLM2-135M-Instruct, a pretrained model that a laptop trains, on the embedded corpus: what its recipes share."""

from slicetune.engine.config import DataConfig, EvaluateConfig, ModelConfig, RunConfig, TrainConfig
from slicetune.engine.methods.method import Method


def row(name: str, method: Method, *, learning_rate: float = 1e-3) -> RunConfig:
    """A recipe's settings; it writes to runs/<name>-smollm2. Few sentences: 15 minutes on two cores."""
    return RunConfig(
        out=f"runs/{name}-smollm2",
        shape="SmolLM2-135M",
        model=ModelConfig(path="HuggingFaceTB/SmolLM2-135M-Instruct"),
        data=DataConfig(
            dir="tiny", prompt="short", score_sentences=40, train_sentences=40, dev_sentences=5, test_sentences=15
        ),
        method=method,
        train=TrainConfig(learning_rate=learning_rate, epochs=2, global_batch_size=8),
        evaluate=EvaluateConfig(max_new_tokens=48),
    )
