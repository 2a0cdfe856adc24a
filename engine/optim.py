"""The sparse-column optimizer, with torch alone."""

from .slices.optim import SparseColumnAdamW

__all__ = ["SparseColumnAdamW"]
