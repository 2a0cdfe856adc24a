"""A model routed by LANDeRMT's Routes: to decode with them, and to train each owner's units.

    router = route(model, routes)                      # to decode, or to look at losses
    router.set(["de-en", "en-fr"])                     # the pair of each row of the next batch
    params = attach(model, routes, groups=data.pairs)  # to train: every owner's slices are parameters of their own

What it computes: routed.py. What is updated when: groups.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ...common.errors import UserError
from ...models.sites import find_ffns
from ...slices.fused import FusedFFN
from ...slices.groups import UpdateGroup
from .owned import OwnedLinear
from .routed import RoutedFFN, Router
from .routes import GENERAL, Routes

Trains = Literal["all", "general", "specific"]


def route(model: nn.Module, routes: Routes, groups: Sequence[str] = (), recompute: bool = False) -> Router:
    """Put a RoutedFFN in the place of every FFN that `routes` name, in place; weights are shared. Returns the router.

    A model that was routed before follows the new routes alone.
    Raises UserError if the routes were made for another model.
    """
    sites = find_ffns(model)
    if len(sites) != routes.total_layers:
        raise UserError(f"the routes are of a model of {routes.total_layers} layers, this one has {len(sites)}")
    router = Router(routes.pairs, groups)
    for site in sites:
        if isinstance(site.module, RoutedFFN):
            model.set_submodule(site.name, FusedFFN(site, recompute))
    for position, layer in enumerate(routes.layers):
        site = sites[layer]
        width = getattr(site.module, list(site.projections.values())[-1]).in_features
        if width != routes.intermediate:
            raise UserError(f"the routes are of FFNs of {routes.intermediate} units, {site.name} has {width}")
        ffn = RoutedFFN(site, router, routes.gains(position), routes.takes[:, position], routes.site, recompute)
        model.set_submodule(site.name, ffn)
    return router


def routed_ffns(model: nn.Module) -> list[tuple[str, RoutedFFN]]:
    """(name, module) in layer order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, RoutedFFN)]


def router_of(model: nn.Module) -> Router | None:
    """The router of a routed model; None of any other."""
    return next((ffn.router for _, ffn in routed_ffns(model)), None)


def owned_units(routes: Routes, position: int, trains: Trains = "all") -> dict[str, tuple[Tensor, frozenset[str]]]:
    """Owner → (its units, the pairs that train them) of one routed layer; owners that train nothing are left out."""
    names = {GENERAL: "general"} | dict(enumerate(routes.languages))
    owned = {}
    for owner, name in names.items():
        if trains != "all" and (owner == GENERAL) != (trains == "general"):
            continue
        units, pairs = (routes.owner[position] == owner).nonzero().flatten(), routes.participants(position, owner)
        if len(units) and pairs:
            owned[name] = (units, frozenset(pairs))
    return owned


def attach(
    model: nn.Module,
    routes: Routes,
    groups: Sequence[str],
    trains: Trains = "all",
    attention: bool = False,
    share_rate: float = 1.0,
    recompute: bool = False,
) -> list[nn.Parameter]:
    """Freeze `model`, route it, and make each owner's slices trainable, in place; returns what is trained.

    groups: names of what `Example.group` counts. `attention` trains the rest of the chosen blocks too, in the general
    group, so never where only specific units train: attention, norms, and the bias of the FFN's output projection,
    which is no unit's (the paper's 805 M on BLOOM-7b1 are four whole blocks, with that bias; the units have 537 M). A
    micro-batch must then hold sentences of one pair. Learned shares have a learning rate of `share_rate` times the
    run's and no weight decay.
    """
    attention = attention and trains != "specific"
    model.requires_grad_(False)
    route(model, routes, groups, recompute)
    for position, (name, ffn) in enumerate(routed_ffns(model)):
        owned = owned_units(routes, position, trains)
        if owned:
            _own(ffn, owned, attention)
        if owned and attention:
            block = model.get_submodule(name.rpartition(".")[0])
            _train_rest(block, ffn, UpdateGroup(frozenset(routes.participants(position, GENERAL))))
        if routes.car == "learned":
            pairs = torch.zeros(len(routes.pairs))
            ffn.learn(routes.share[:, position], routes.gains(position, pairs), routes.gains(position, pairs + 1))
            for pair, logit in ffn.shares.items():
                logit.update_group = UpdateGroup(frozenset([pair]), share_rate, decays=False)
    return [p for p in model.parameters() if p.requires_grad]


def _own(ffn: RoutedFFN, owned: dict[str, tuple[Tensor, frozenset[str]]], whole_bias: bool) -> None:
    units = {owner: index for owner, (index, _) in owned.items()}
    last = list(ffn.roles)[-1]
    for role in ffn.roles:
        linear = ffn.projection(role)
        split = OwnedLinear(linear, int(role == last), units, whole_bias and role == last)
        setattr(ffn, ffn.roles[role], split)
        for slices in (split.rows, split.columns, split.bias_rows):
            for owner, p in slices.items():
                p.update_group = UpdateGroup(owned[owner][1])


def _train_rest(block: nn.Module, ffn: RoutedFFN, group: UpdateGroup) -> None:
    """Everything in the block that is no unit's slice."""
    inside = {id(p) for p in ffn.parameters()}
    rest = [p for p in block.parameters() if id(p) not in inside]
    last = ffn.linears()[-1]
    rest += [last.bias] if last.bias is not None else []
    for p in rest:
        p.requires_grad_(True)
        p.update_group = group
        if not ffn.all_take and id(p) not in inside:
            p.register_hook(lambda grad: grad * ffn.takes[ffn.router.rows.to(grad.device)].all())
