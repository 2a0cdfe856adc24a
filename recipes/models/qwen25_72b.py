"""Qwen2.5-72B-Instruct, German–English, in the setting of CANEFT's tables: what its recipes share."""

from functools import partial

from slicetune.recipes.models.caneft import table_row

row = partial(table_row, "qwen25-72b", "Qwen/Qwen2.5-72B-Instruct", "Qwen2.5-72B")
"""`row(name, method, …)` with the settings that caneft.py has for all models. No GPU holds it: `auto` partitions it."""
