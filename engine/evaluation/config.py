"""Settings of decoding and metrics: --evaluate.*."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..common.settings import check_bounds


@dataclass
class EvaluateConfig:
    """Decoding and metrics."""

    batch_size: int = 32
    max_new_tokens: int = 256
    base: bool = True
    """Decode the untrained base model too, for comparison."""
    smooth: Literal["exp", "none"] = "exp"
    """sacreBLEU's smoothing of an n-gram order without a match; its signature names it. LANDeRMT prints `none`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the exported model; `auto` is the base checkpoint's own."""
    comet: str = ""
    """COMET too: a model of the hub, or its folder; `default` is Unbabel/wmt22-cometkiwi-da (no references)."""
    comet_python: str = ""
    """Python of COMET's environment (`make comet-env`); empty: $SLICETUNE_COMET_PYTHON, else .venv-comet's."""

    def __post_init__(self) -> None:
        check_bounds(self, "evaluate", dict.fromkeys(("batch_size", "max_new_tokens"), (1, math.inf)))
