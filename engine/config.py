"""The settings of a run, as recipes write them."""

from .data.config import DataConfig
from .evaluation.config import EvaluateConfig
from .export.config import ExportConfig
from .models.config import ModelConfig
from .run.config import RunConfig
from .scoring.config import ScoreConfig
from .training.config import TrainConfig, ZeroConfig

__all__ = [
    "DataConfig",
    "EvaluateConfig",
    "ExportConfig",
    "ModelConfig",
    "RunConfig",
    "ScoreConfig",
    "TrainConfig",
    "ZeroConfig",
]
