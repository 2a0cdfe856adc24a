"""Settings of the scoring pass: --score.*."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..common.settings import check_bounds, matters

USUAL_TOKENS = 4096


@dataclass
class ScoreConfig:
    """The scoring pass (CANEFT Eq. 1–3 and 8)."""

    loss: Literal["mean", "sum"] = "mean"
    """Cross-entropy of a sample's target tokens: their mean, or Eq. 2's sum."""
    tokens: Literal["all", "target"] = "all"
    """Average |A·G| over every unpadded position, or over those that predict target tokens only."""
    token_reduce: Literal["mean_abs", "abs_sum"] = "mean_abs"
    """`mean_abs` is Eq. 8; `abs_sum`, |Σ A·G|, is the first-order change of the loss when the channel is silenced."""
    tokens_per_batch: int | Literal["auto"] = matters("", "auto")
    """Tokens of one packed batch. Samples do not interact: it changes speed and memory, not scores. `auto`: 4096, or
    fewer where a GPU does not hold so many by the dry run's arithmetic."""
    counts: Literal["auto", "device", "host"] = matters("", "auto")
    """Where a rank's histogram counts live; `auto`: on the device where they fit there beside all else, by the dry
    run's arithmetic."""
    reuse: str = matters("", "")
    """A run's folder whose statistics are taken instead, if it scored the same sentences with the same settings."""
    save_minutes: float = matters("", 10.0)
    """Every so often the ranks save their statistics (2.1 GB for four domains on an 8B), to go on after a break."""

    def __post_init__(self) -> None:
        numbers = {} if self.tokens_per_batch == "auto" else {"tokens_per_batch": (1, math.inf)}
        check_bounds(self, "score", numbers | {"save_minutes": (0, math.inf)})

    @property
    def batch_tokens(self) -> int:
        """Tokens of one batch; USUAL_TOKENS where it is still `auto`."""
        return USUAL_TOKENS if self.tokens_per_batch == "auto" else self.tokens_per_batch
