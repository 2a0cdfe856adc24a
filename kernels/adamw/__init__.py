"""AdamW over all slices in one launch."""

from .op import adamw_
from .reference import Slice

__all__ = ["Slice", "adamw_"]
