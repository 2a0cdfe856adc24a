"""LANDeRMT: layers and units found by language pair, trained and routed by pair; its ablations."""

from .settings import Landermt, Layers, Lg, Ls

__all__ = ["Landermt", "Layers", "Lg", "Ls"]
