"""Gemma-2-9B-it, German–English, named on CANEFT's project page: what its recipes share."""

from functools import partial

from slicetune.recipes.models.caneft import table_row

row = partial(table_row, "gemma2", "google/gemma-2-9b-it", "Gemma-2-9B")
"""`row(name, method, …)` with the settings that caneft.py has for all models."""
