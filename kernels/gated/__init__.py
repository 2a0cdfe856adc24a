"""The gated activation, its backward, and the scores from the same registers."""

from .op import gated_backward, gated_forward
from .reference import GatedBackward

__all__ = ["GatedBackward", "gated_backward", "gated_forward"]
