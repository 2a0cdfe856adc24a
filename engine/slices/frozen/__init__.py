"""A frozen weight, plain or quantised, of which some rows or columns are parameters: what it multiplies."""
