"""Chosen neurons, trainable in a model of your own: `ffn.attach(model, neurons)`, `ffn.save(model, folder)`."""

from .slices.ffn import attach, save

__all__ = ["attach", "save"]
