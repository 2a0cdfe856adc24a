"""A pass over a model that leaves statistics of its neurons: passes.py is the pass, statistics.py what it adds up."""
