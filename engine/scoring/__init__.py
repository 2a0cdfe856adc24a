"""A pass over a model that leaves statistics of its neurons."""
