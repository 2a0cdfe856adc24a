"""Llama-2-7B-Chat, German–English, as in CANEFT's tables: what its recipes share."""

from functools import partial

from slicetune.recipes.models.caneft import table_row

row = partial(table_row, "llama2", "meta-llama/Llama-2-7b-chat-hf", "Llama-2-7B")
"""`row(name, method, …)` with the settings that caneft.py has for all models."""
