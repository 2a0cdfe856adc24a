"""Neurons from statistics: `select.select(statistics, Caneft(neuron_ratio=0.01))`."""

from .methods.select import select

__all__ = ["select"]
