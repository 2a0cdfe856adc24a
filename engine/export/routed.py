"""One language pair of a routed model as an ordinary Hugging Face model: its gains become part of the weights.

    slicetune fold runs/landermt/model --pair de-en de-en-model

A unit's gain c multiplies its gate and up rows (of BLOOM the weight's row, not the bias), or its down column where the
routes are at the output; a unit that takes no part gets a down column of zeros. The logits are the routed model's, but
for the rounding of the folded weights to their dtype (--dtype float32 keeps that of a bfloat16 model off).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common.errors import UserError
from ..methods.landermt.routes import ROUTES, Routes
from ..methods.landermt.routing import route
from ..models.config import ModelConfig
from ..models.load import Held, load_model
from ..models.sites import checkpoint_sites
from ..slices.patches import Patch
from .model import export_model


def fold(folder: str | Path, pair: str, out: str | Path, dtype: str = "auto") -> dict:
    """Write the routed model in `folder` for `pair` to `out`; returns what export_model counts.

    Raises UserError for a folder that holds no routed model, and a pair without a route.
    """
    folder = Path(folder)
    return export_model(folder, patches(folder, Routes.load(folder / ROUTES), pair), out, dtype)


def patches(folder: Path, routes: Routes, pair: str) -> dict[str, Patch]:
    """Tensor name → what makes the folded weight of the routed one; layers that the pair leaves alone have none."""
    row, sites, found = routes.row(pair), checkpoint_sites(folder), {}
    for position, layer in enumerate(routes.layers):
        if not routes.takes[row, position]:
            continue
        gain = routes.gains(position)[row]
        *_, last = sites[layer].projections
        for role, child in sites[layer].projections.items():
            if role == last:
                columns = gain if routes.site == "output" else (gain != 0).float()
                scale = _scaled(columns[None, :])
            elif routes.site == "input":
                scale = _scaled(gain[:, None])
            else:
                continue
            found[f"{sites[layer].name}.{child}.weight"] = Patch(None, None, scale)
    return found


def _scaled(gain: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda weight: weight * gain  # in float32 at least


def load_routed(
    folder: str | Path, config: ModelConfig | None = None, device: torch.device | None = None, held: Held = "whole"
) -> nn.Module:
    """The model of a run's `model/` folder, routed: tell `router_of(model)` the pairs of a batch, then call it.

    `held` is load_model's. Raises UserError for a folder without routes, or with those of another model.
    """
    routes = routes_in(Path(folder))
    model = load_model(str(folder), config or ModelConfig(), device or torch.device("cpu"), held=held)
    route(model, routes)
    return model


def routes_in(folder: Path) -> Routes:
    """Those of a run's `model/` folder. Raises UserError for a folder without them."""
    if not (folder / ROUTES).is_file():
        raise UserError(f"{folder}: no {ROUTES} in it: name the model/ folder of a LANDeRMT run")
    return Routes.load(folder / ROUTES)
