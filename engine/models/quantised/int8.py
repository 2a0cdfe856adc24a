"""An int8 layer whose product reads its weights alone as integers.

bitsandbytes' own int8 product rounds the activations to 8 bits as well, in a way that depends on the device and on
whether the layer is in training. Scores, training and decoding must be of one function: x · Ŵᵀ. This file imports
bitsandbytes, so it is imported where such a layer is made.
"""

from __future__ import annotations

import bitsandbytes
import torch
from torch import Tensor
from torch.nn import functional as F

from .layers import dequantised


class Int8Linear(bitsandbytes.nn.Linear8bitLt):
    """y = x · Ŵᵀ + b with Ŵ = integers · row maximum / 127."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) → (..., out)."""
        y = _Product.apply(x, self)
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    """The weight is made floats again in the backward: autograd would keep it otherwise."""

    @staticmethod
    def forward(ctx, x, linear):
        ctx.linear = linear
        return F.linear(x, dequantised(linear, x.dtype))

    @staticmethod
    def backward(ctx, dy):
        return dy @ dequantised(ctx.linear, dy.dtype), None
