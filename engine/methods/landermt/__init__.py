"""LANDeRMT: layers and units found by language pair, trained and routed by pair; its ablations.

In the order of a run: settings (what can be set; `Landermt.routes_of` makes the routes), detect and detection (what is
counted), awareness (what is made of it), routes (the artefact), owned, routed and routing (the model), patches (what is
kept).
"""

from .settings import Landermt, Layers, Lg, Ls

__all__ = ["Landermt", "Layers", "Lg", "Ls"]
