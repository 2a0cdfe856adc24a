"""The sparse-column optimizer, with torch alone."""

from .slices.optim import SparseColumnAdamW, clip_factor, write_back

__all__ = ["SparseColumnAdamW", "clip_factor", "write_back"]
