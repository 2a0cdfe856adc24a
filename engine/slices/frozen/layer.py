"""What every layer with trained slices is: a frozen weight, and when the slices are written into it.

Of a quantised layer nothing is written: it stays as it is, and whoever multiplies by the weight gets one with the
slices in it (products.py). A slice then begins with the unquantised values, which it reads from the checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...models.quantised import float8
from ...models.quantised.float8 import Float8Linear
from ...models.quantised.layers import kind

Part = tuple[nn.Parameter, str, int, Tensor]
"""A trained part: its parameter, "weight" or "bias", the axis, and the index of its rows (0) or columns (1)."""


class SlicedLinear(nn.Module):
    """A linear layer whose weight [out, in] is frozen and of which subclasses train parts."""

    left = False
    """Whether whoever steps writes the slices into the weight (`leave_to_optimizer`)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.frozen: nn.Linear | None = linear if kind(linear) else None
        """The layer itself where it is quantised."""
        self.weight: nn.Parameter | None = None if self.frozen is not None else linear.weight
        self.bias, self.training = linear.bias, linear.training
        self.out_features, self.in_features = linear.out_features, linear.in_features
        linear.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        if self.frozen is not None:
            self.frozen.bias = None

    @property
    def device(self) -> torch.device:
        return (self.weight if self.frozen is None else self.frozen.weight).device

    def take(self, axis: int, index: Tensor) -> Tensor:
        """The base's values of rows [k, in], or of columns stored as rows [k, out]: where a slice begins."""
        if isinstance(self.frozen, Float8Linear):
            float8.without(self.frozen.values, axis, index)  # its product adds what the slices give
        if self.frozen is not None:
            return self.frozen.stored.part(axis, index)
        weight = self.weight.detach()
        return weight[:, index].t().contiguous() if axis else weight[index].clone()

    def parts(self) -> list[Part]:
        """Every trained part."""
        raise NotImplementedError

    def slices(self) -> list[Part]:
        """The parts that are written into a tensor: all, or of a quantised layer those of the bias."""
        return [part for part in self.parts() if self.frozen is None or part[1] == "bias"]

    @torch.no_grad()
    def refresh(self) -> None:
        """Write the slices into the weight.

        `.data` keeps autograd's version counter still: the values are those that the graph was built with.
        """
        for parameter, tensor, axis, index in self.slices():
            weight, values = getattr(self, tensor).data, parameter.data
            weight.index_copy_(axis, index, (values.t() if axis else values).to(weight.dtype))

    def before_forward(self) -> None:
        """Write the slices, unless the optimizer has: any optimizer may have stepped since."""
        if not self.left:
            self.refresh()
