"""Chosen neurons, trainable in a model of your own: `ffn.attach(model, neurons)`."""

from .slices.ffn import attach

__all__ = ["attach"]
