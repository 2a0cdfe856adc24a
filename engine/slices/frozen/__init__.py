"""A frozen weight, whole or quantised, some rows or columns of which are parameters of their own: what it multiplies."""
