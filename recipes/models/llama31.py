"""Llama-3.1-8B-Instruct, German–English, as in CANEFT's tables: what its recipes share."""

from functools import partial

from slicetune.recipes.models.caneft import table_row

row = partial(table_row, "llama31", "meta-llama/Llama-3.1-8B-Instruct", "Llama-3.1-8B")
"""`row(name, method, …)` with the settings that caneft.py has for all models."""
