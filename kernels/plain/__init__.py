"""The activation of an FFN without a gate (BLOOM's GELU), its backward and scores."""

from .op import plain_backward, plain_forward
from .reference import PlainBackward

__all__ = ["PlainBackward", "plain_backward", "plain_forward"]
