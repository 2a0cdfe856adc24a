"""Settings of decoding and metrics: --evaluate.*."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..common.settings import check_bounds, matters


@dataclass
class EvaluateConfig:
    """Decoding and metrics."""

    batch_size: int = matters("", 32)
    max_new_tokens: int = matters("decode", 256)
    on: Literal["auto", "quantised", "full"] = matters("", "auto")
    """With --model.quantize: decode the slices on the quantised base, as they were trained (`auto`), or the exported
    model in full precision, as it is served."""
    base: bool = matters("", True)
    """Decode the untrained base model too, for comparison."""
    smooth: Literal["exp", "none"] = matters("measure", "exp")
    """sacreBLEU's smoothing of an n-gram order without a match; its signature names it. LANDeRMT prints `none`."""
    dtype: Literal["auto", "float32", "bfloat16"] = matters("export", "auto")
    """Of the exported model; `auto` is the base checkpoint's own."""
    comet: str = matters("measure", "")
    """COMET too: a model of the hub, or its folder; `default` is Unbabel/wmt22-cometkiwi-da (no references)."""
    comet_python: str = matters("measure", "")
    """Python of COMET's environment (`make comet-env`); empty: $SLICETUNE_COMET_PYTHON, else .venv-comet's."""

    def __post_init__(self) -> None:
        check_bounds(self, "evaluate", dict.fromkeys(("batch_size", "max_new_tokens"), (1, math.inf)))
