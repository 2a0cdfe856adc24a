"""A trained routed model on disk: the base with the slices in place, and beside it the routes that it is decoded by.

    export_model(base, patches(base, routes, tensors), out); trained(base, routes, tensors).save(out / ROUTES)
    model = load_routed("runs/x/model")          # routed; transformers alone loads the same weights with every gain 1
    router_of(model).set(["de-en", "en-fr"])     # the pair of each row of the next batch

Next: export/routed.py, which loads it, and makes an ordinary model of it for one pair.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...common.checkpoint import masters
from ...models.sites import checkpoint_sites
from ...slices.patches import Patch
from .routes import Routes
from .routing import Trains, owned_units


def patches(base: Path, routes: Routes, tensors: dict[str, Tensor], trains: Trains = "all") -> dict[str, Patch]:
    """What a checkpoint of routed training changes in the base: tensor name → rows, columns, or the whole of it."""
    trained, sites, found = masters(tensors), checkpoint_sites(base), {}
    for position, layer in enumerate(routes.layers):
        owned = owned_units(routes, position, trains)
        index = torch.cat([units for units, _ in owned.values()]) if owned else None
        *_, last = sites[layer].projections
        for role, child in sites[layer].projections.items() if owned else ():
            name, (axis, kind) = f"{sites[layer].name}.{child}", _kind(role == last)
            values = torch.cat([trained.pop(f"{name}.{kind}.{owner}") for owner in owned])
            found[f"{name}.weight"] = Patch(axis, index, values)
            bias = [trained.pop(f"{name}.bias_rows.{owner}", None) for owner in owned]
            if bias[0] is not None:
                found[f"{name}.bias"] = Patch("row", index, torch.cat(bias))
    return found | {name: Patch(None, None, t) for name, t in trained.items() if ".shares." not in name}


def _kind(last: bool) -> tuple[str, str]:
    return ("column", "columns") if last else ("row", "rows")


def trained(base: Path, routes: Routes, tensors: dict[str, Tensor]) -> Routes:
    """The routes with the shares as a checkpoint has learned them; without learned shares, as they were."""
    if routes.car != "learned":
        return routes
    learned, sites, share = masters(tensors), checkpoint_sites(base), routes.share.clone()
    for position, layer in enumerate(routes.layers):
        for row, pair in enumerate(routes.pairs):
            if routes.takes[row, position]:
                share[row, position] = torch.sigmoid(learned[f"{sites[layer].name}.shares.{pair}"])
    return replace(routes, share=share)
