"""A file a model: what its recipes share."""
