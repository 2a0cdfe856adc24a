"""Llama-3.3-70B-Instruct, German–English, in the setting of CANEFT's tables: what its recipes share."""

from functools import partial

from slicetune.recipes.models.caneft import table_row

row = partial(table_row, "llama33-70b", "meta-llama/Llama-3.3-70B-Instruct", "Llama-3.3-70B")
"""`row(name, method, …)` with the settings that caneft.py has for all models. No GPU holds it: `auto` partitions it."""
