"""Whether a system computes what it says: its loss, its gradients, and that its blocks were compiled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from harness import Wrong
from shapes import DTYPE
from systems import System, blocks
from torch import Tensor, nn

from slicetune.engine.models import sites as sites_module
from slicetune.engine.slices.neurons import NeuronSet

ROUNDING = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
"""Relative error of one rounding."""


def same_loss(system: System, loss: float) -> None:
    """Raises Wrong unless the untrained system's loss is the base's."""
    with torch.no_grad():
        own = float(system.loss())
    if not abs(own - loss) <= 2e-3 * abs(loss):
        raise Wrong(f"its loss is {own:.5f} before training, the base's {loss:.5f}")


def is_compiled(system: System) -> None:
    """Raises Wrong unless every block of the model runs as compiled code: the profiler sees each one's region."""
    system.loss()
    with torch.autograd.profiler.profile() as profile:
        system.loss()
    found = sum(event.name().startswith("Torch-Compiled Region") for event in profile.kineto_results.events())
    if found < len(blocks(system.model)):
        raise Wrong(f"{found} compiled regions ran, for {len(blocks(system.model))} blocks")


def gradient_limit(layers: int, dtype: torch.dtype) -> float:
    """The most that the relative error of a slice's gradient may be: 8 roundings × √layers in half precision.

    Errors of one rounding a step are independent and grow with the root of the steps. Measured between plain torch in
    bfloat16 and in float32: 0.007 with 2 layers, 0.012 with 8, 0.024 with 32, so 2.2 roundings × √layers (the limits:
    0.022, 0.044, 0.088). What is left above that is for other attention kernels.
    """
    return 8 * ROUNDING[dtype] * layers**0.5 if dtype in ROUNDING else 1e-3


def gradient_fault(got: Tensor, want: Tensor, limit: float) -> str:
    """What is wrong with the gradient of one slice [k, n], or an empty string.

    Its relative error; its scale, in which rounding averages out and a wrong factor does not; and each row's error,
    relative to that row or to a middling one (a row that hardly has a gradient is all rounding).
    """
    if got.shape != want.shape:
        return f"has shape {tuple(got.shape)}, not {tuple(want.shape)}"
    got, want = got.double(), want.double()
    difference, size = got - want, want.norm()
    error = float(difference.norm() / size)
    scale = float((got * want).sum() / size**2)
    rows = want.norm(dim=1).clamp_min(float(want.square().sum(1).mean().sqrt()))
    row = float((difference.norm(dim=1) / rows).max())
    if not error <= limit:
        return f"relative error {error:.2g} is above {limit:.2g}"
    if not abs(scale - 1) <= limit / 2:
        return f"is {scale:.4f} times what it should be, more than {limit / 2:.2g} off"
    return "" if row <= limit else f"one row's error {row:.2g} is above {limit:.2g}"


def full_gradients(base: nn.Module, ours: System, neurons: NeuronSet) -> dict[str, Tensor]:
    """By "layer role", in ffn.attach's order: the chosen rows of the weight gradients that plain torch computes."""
    keys = [key for key in sorted(neurons.slices) if len(neurons.slices[key])]
    sites = sites_module.find_ffns(base)
    weights = [getattr(sites[layer].module, sites[layer].projections[role]).weight for layer, role, _ in keys]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        System(base, ours.batch, []).gradients()
        rows = [w.grad[neurons.slices[key].to(w.device)] for w, key in zip(weights, keys, strict=True)]
    finally:
        for weight in weights:
            weight.grad = None
            weight.requires_grad_(False)
    return {f"{layer} {role}": grad for (layer, role, _), grad in zip(keys, rows, strict=True)}


def judge(got: Sequence[Tensor], want: dict[str, Tensor], layers: int, dtype: torch.dtype) -> None:
    """Raises Wrong at the first slice whose gradient has a fault."""
    for grad, (name, full) in zip(got, want.items(), strict=True):
        if fault := gradient_fault(grad, full, gradient_limit(layers, dtype)):
            raise Wrong(f"gradient of layer {name}: {fault}")


def same_gradients(ours: System, base: nn.Module, neurons: NeuronSet) -> None:
    """Raises Wrong unless the slices' gradients are those rows of the full weight gradients."""
    ours.gradients()
    got = [p.grad.clone() for p in ours.params]
    ours.optimizer.zero_grad()
    judge(got, full_gradients(base, ours, neurons), len(blocks(base)), DTYPE)
