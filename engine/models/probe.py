"""What a module with two or three linear layers computes: whether it is an FFN, and which of its layers is which.

    y = down(act(gate(x)) · up(x))        gated; gate and up may be the two halves of one layer's rows (Phi-3, GLM-4)
    y = out(act(in(x)))                   plain

Names say nothing. The sizes of the layers leave a few readings; the class's own forward runs on a copy with small
random layers in float64, and the reading that gives its values is the right one. None does for an FFN that is more
than its layers: a dropout, a norm, a clamp, a factor. One with weights beside its layers is refused unseen: they can
be of no effect only as long as they are what they are.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...kernels.common.activations import ACTIVATIONS, value
from ..common.errors import UserError
from ..common.private import with_children

HIDDEN, UNITS, TOKENS = 4, 8, 6
"""Sizes of the copy's layers."""
SCALES = (1e-2, 1.0, 10.0, 10.0, 1e3, 1e5)
"""Of each token: a clamp shows in large values, an activation's form in middling ones."""
REPLACED = (
    "its forward was replaced by another one (Liger, a patch) that cannot be looked into: attach the neurons first, "
    "then patch the model"
)


class Found(NamedTuple):
    """An FFN: which child plays which role, and the kernels' name of its activation."""

    projections: dict[str, str]
    activation: str


class Reading(NamedTuple):
    """What a module may be by the sizes of its layers; `sizes` are the copy's (inputs, outputs)."""

    projections: dict[str, str]
    sizes: dict[str, tuple[int, int]]


def known(module: nn.Module) -> Found | None:
    """What a FusedFFN says of itself."""
    roles = getattr(module, "roles", None)
    return Found(roles, module.activation) if roles else None


def probe(module: nn.Module, name: str) -> Found | None:
    """What an FFN is; None for a module that is none. Raises UserError for one that is more than its layers."""
    linears = {child: m for child, m in module.named_children() if isinstance(m, nn.Linear)}
    given = [*_readings(linears)] if len(linears) in (2, 3) else []
    takes = _arguments(module)
    if not given or takes is None or "Attention" in type(module).__name__:
        return None
    _check_whole(module, name, linears)
    for reading in given:
        layers, x = _small_layers(reading, linears)
        y = _own_forward(module, layers, x, takes)
        for activation in ACTIVATIONS if y is not None else ():
            if torch.allclose(y, _expected(reading, layers, x, activation), rtol=1e-6, atol=1e-6):
                return Found(reading.projections, activation)
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
        raise UserError(f"{name}: {REPLACED}")
    raise UserError(
        f"{name}: {type(module).__name__} does more than its linear layers and one of SiLU, GELU, ReLU, ReLU² (another "
        "activation, dropout, a norm, a clamp, a factor): no FFN that this engine knows; dropout must be 0 in the "
        "model's config"
    )


def _check_whole(module: nn.Module, name: str, linears: dict[str, nn.Linear]) -> None:
    """Raises UserError for tensors beside the linear layers, which would be lost."""
    tensors = [own for own, _ in (*module.named_parameters(), *module.named_buffers())]
    if others := [own for own in tensors if own.partition(".")[0] not in linears]:
        raise UserError(
            f"{name}: {type(module).__name__} has {others[0]} beside its linear layers: no FFN that this engine knows"
        )


def _readings(linears: dict[str, nn.Linear]) -> Iterator[Reading]:
    """Every assignment of roles that the sizes allow."""
    sizes = {child: (m.in_features, m.out_features) for child, m in linears.items()}
    inner, outer = (HIDDEN, UNITS), (UNITS, HIDDEN)
    for last, (units, hidden) in sizes.items():
        first = [child for child in sizes if child != last]
        if len(first) == 2 and all(sizes[child] == (hidden, units) for child in first):
            for gate, up in (first, first[::-1]):
                yield Reading({"gate": gate, "up": up, "down": last}, {gate: inner, up: inner, last: outer})
        elif len(first) == 1 and sizes[first[0]] == (hidden, 2 * units):
            packed = {"gate": first[0], "up": first[0], "down": last}
            yield Reading(packed, {first[0]: (HIDDEN, 2 * UNITS), last: outer})
        elif len(first) == 1 and sizes[first[0]] == (hidden, units):
            yield Reading({"in": first[0], "out": last}, {first[0]: inner, last: outer})


def _arguments(module: nn.Module) -> int | None:
    """How many tensors the forward needs: x alone, or x and the residual that BLOOM's adds. None: this is no FFN."""
    given = list(inspect.signature(type(module).forward).parameters.values())[1:]
    needed = [p.name for p in given if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return len(needed) if len(needed) == 1 or needed[1:] == ["residual"] else None


def _small_layers(reading: Reading, linears: dict[str, nn.Linear]) -> tuple[dict[str, nn.Linear], Tensor]:
    """Layers of the copy with large random values, and x [TOKENS, HIDDEN]."""
    draw, layers = torch.Generator().manual_seed(0), {}
    with torch.random.fork_rng(devices=[]):  # a new layer draws its values
        for child, (inputs, outputs) in reading.sizes.items():
            bias = linears[child].bias is not None
            layers[child] = nn.Linear(inputs, outputs, bias=bias, device="cpu", dtype=torch.float64)
    for layer in layers.values():
        for p in layer.parameters():
            nn.init.normal_(p, generator=draw)
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, device="cpu", generator=draw)
    return layers, x * x.new_tensor(SCALES)[:, None]


def _own_forward(module: nn.Module, layers: dict[str, nn.Linear], x: Tensor, takes: int) -> Tensor | None:
    """Its own forward on the copy, in training, where dropout shows; None where it cannot run."""
    forward = _forward_of(module)
    if forward is None:
        return None
    others = {name: copy.copy(child).train() for name, child in module.named_children() if name not in layers}
    stub = with_children(module, others | layers)
    stub.training = True
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            y = forward(stub, x, *[torch.zeros_like(x)] * (takes - 1))
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):
        return None
    return y if isinstance(y, Tensor) and y.shape == x.shape else None


def _forward_of(module: nn.Module) -> Callable[..., Any] | None:
    """As a function of the module: its class's, or the method that was put on it; None for any other function on it.

    Accelerate's hooks for a device map are functions on it too. They only move tensors.
    """
    own = vars(module).get("forward")
    if own is None or hasattr(module, "_hf_hook"):
        return type(module).forward
    return own.__func__ if inspect.ismethod(own) and own.__self__ is module else None


def _expected(reading: Reading, layers: dict[str, nn.Linear], x: Tensor, activation: str) -> Tensor:
    first = [layers[child](x) for child in dict.fromkeys(list(reading.projections.values())[:-1])]
    pre = first[0].chunk(2, -1) if len(first) < len(reading.projections) - 1 else first
    h = value(pre[0], activation)
    return layers[list(reading.projections.values())[-1]](h * pre[1] if len(pre) == 2 else h)
