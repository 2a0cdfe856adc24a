"""Scoring as CANEFT's authors do it, written here as the baseline: hooks, one sentence at a time, every score kept.

For each sentence a forward and a backward of the whole model with all weight gradients; hooks keep the output of each
FFN projection and its gradient until the sentence is done; then |activation × gradient|, averaged over the tokens, is
kept for each neuron and sentence until the selection has seen them all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slicetune.engine.data.batching import Example, pad
from slicetune.engine.models.sites import find_ffns
from slicetune.engine.scoring.loss import target_losses


class HookScorer:
    """Keeps `scores`: for each sentence a tensor [neurons] on the host, in the flat order of neurons."""

    def __init__(self, model: nn.Module, weight_gradients: bool = True) -> None:
        """weight_gradients: as the authors' program has it; without them is the better-off form of the same."""
        self.model = model.requires_grad_(weight_gradients)
        self.activations: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.scores: list[Tensor] = []
        self.names, self.hooks = [], []
        for site in find_ffns(model):
            for role, child in site.projections.items():
                self.names.append(f"{site.layer}.{role}")
                self.hooks.append(getattr(site.module, child).register_forward_hook(self._keep(self.names[-1])))
        if not weight_gradients:
            embeddings = model.get_input_embeddings()
            self.hooks.append(embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_()))

    def _keep(self, name: str):
        def on_forward(module: nn.Module, args: tuple, out: Tensor) -> None:
            self.activations[name] = out.detach()
            out.register_hook(lambda gradient: self.gradients.__setitem__(name, gradient.detach()))

        return on_forward

    def score(self, examples: Sequence[Example]) -> None:
        device = next(self.model.parameters()).device
        for example in examples:
            self.model.zero_grad(set_to_none=True)
            target_losses(self.model, pad([example], 0).to(device)).mean().backward()
            each = [(self.activations[n] * self.gradients[n]).abs().flatten(0, 1).float().mean(0) for n in self.names]
            self.scores.append(torch.cat(each).cpu())
        self.model.zero_grad(set_to_none=True)
        self.activations.clear()
        self.gradients.clear()

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()
