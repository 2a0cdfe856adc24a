"""A file a row of the papers' tables: torchrun recipes/NAME.py, or where installed -m slicetune.recipes.NAME."""
