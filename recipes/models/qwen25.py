"""Qwen2.5-7B-Instruct, German–English, as in CANEFT's tables: what its recipes share."""

from functools import partial

from slicetune.recipes.models.caneft import table_row

row = partial(table_row, "qwen25", "Qwen/Qwen2.5-7B-Instruct", "Qwen2.5-7B")
"""`row(name, method, …)` with the settings that caneft.py has for all models."""
