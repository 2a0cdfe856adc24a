"""Baichuan2-7B-Base, ten directions, as in LANDeRMT's tables: what its recipes share."""

from functools import partial

from slicetune.recipes.models.landermt import table_row, untrained_row

MODEL = "baichuan2", "baichuan-inc/Baichuan2-7B-Base", "Baichuan2-7B"
row = partial(table_row, *MODEL)
"""`row(name, method, …)` with the settings that landermt.py has for all models."""
untrained = partial(untrained_row, *MODEL)
"""The same of a method that trains nothing."""
