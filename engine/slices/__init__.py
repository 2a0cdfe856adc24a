"""What is chosen, and trained in it: neurons, linear layers that train few rows or columns, their optimizer."""

from .ffn import merge
from .linear import SliceLinear, slice_linears
from .optim import SparseColumnAdamW

__all__ = ["SliceLinear", "SparseColumnAdamW", "merge", "slice_linears"]
