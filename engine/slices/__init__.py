"""What is chosen, and trained in it: neurons, linear layers that train few rows or columns, their optimizer."""

from .linear import SliceLinear, merge, slice_linears
from .optim import SparseColumnAdamW

__all__ = ["SliceLinear", "SparseColumnAdamW", "merge", "slice_linears"]
