"""A base whose frozen weights are stored in fewer bits: NF4, int8, float8."""
