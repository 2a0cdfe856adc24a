"""OwnedLinear: a frozen weight whose rows or columns have several owners, each with a parameter of its own.

LANDeRMT gives every unit of an FFN to one owner: the general group or a language. What belongs to an owner is one
parameter (`rows.general`, `rows.de`, …), so that optimizers and ZeRO can update or skip an owner whole; the weight
holds the current values of all, as in slices/linear.py. The gradient is one product over all owned units, then split.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ....kernels.slice_gradient import compact_gradient
from ...models.linears import checked_index
from ...slices.frozen.layer import Part, SlicedLinear
from ...slices.written import gathered, keep_current


class OwnedLinear(SlicedLinear):
    """`owned` maps an owner to its units: rows (axis 0, with their bias entries) or columns (axis 1) of the weight.

    A unit's slice is a row of its owner's parameter: [k, in] of rows, [k, out] of columns. `whole_bias` trains the
    layer's bias [out] as it is, as a parameter of its own: the bias of a layer whose columns are owned is no unit's.
    Raises UserError for a unit with two owners or outside the layer.
    """

    linked: object = None
    """Another one whenever tensors have moved; ZeRO-3 is the one wrapper that routed models are trained under."""

    def __init__(self, linear: nn.Linear, axis: int, owned: Mapping[str, Tensor], whole_bias: bool = False) -> None:
        super().__init__(linear)
        self.axis = axis
        if self.bias is not None:
            self.bias.requires_grad_(whole_bias)
        self.rows, self.columns, self.bias_rows = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        size, where = (self.out_features, self.in_features)[axis], list(owned.values())
        every = checked_index(torch.cat(where), size, "column" if axis else "row").to(self.device)
        self.owned = dict(zip(owned, every.split([len(index) for index in where]), strict=True))
        # Where all units are owned nothing needs to be gathered: the product's rows are the units themselves.
        self.index = None if len(every) == size else every
        with gathered([self.weight, self.bias]):
            self._take()
        keep_current(self)

    def _take(self) -> None:
        """Each owner's slices, of the weight's values."""
        for owner, index in self.owned.items():
            if self.axis:
                self.columns[owner] = nn.Parameter(self.take(1, index))
                continue
            self.rows[owner] = nn.Parameter(self.take(0, index))
            if self.bias is not None:
                self.bias_rows[owner] = nn.Parameter(self.bias.detach()[index].clone())

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("linked", "left")}

    def slots(self) -> list[nn.Parameter]:
        """The trained parameters, in the order of `gradients`."""
        bias = [self.bias] if self.bias is not None and self.bias.requires_grad else []
        return [*self.rows.values(), *self.columns.values(), *self.bias_rows.values(), *bias]

    def parts(self) -> list[Part]:
        """Each owner's."""
        parts = [(self.rows, "weight", 0), (self.columns, "weight", 1), (self.bias_rows, "bias", 0)]
        return [(p, name, axis, self.owned[owner]) for own, name, axis in parts for owner, p in own.items()]

    def before_backward(self) -> None:
        """Write them again where the weight may have been gathered anew."""
        if not self.left:
            self.refresh()

    def gradients(self, units: Tensor, other: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        """dL/d of every slot: unitsᵀ other, split by owner.

        units [T, size], or [T, k] = units[:, index] where not all are owned: dy of rows, x of columns; other
        [T, width]: x of rows, dy of columns. `bias`: the gradient [size] or [k] of the rows' bias entries, or [out]
        of the whole bias.
        """
        product = compact_gradient(units, other)
        grads = [part.to(p.dtype) for part, p in zip(self._split(product), self._slices(), strict=True)]
        if self.bias_rows:
            parts = zip(self._split(bias), self.bias_rows.values(), strict=True)
            grads += [part.to(p.dtype) for part, p in parts]
        elif self.bias is not None and self.bias.requires_grad:
            grads.append(bias.to(self.bias.dtype))
        return tuple(grads)

    def _slices(self) -> list[nn.Parameter]:
        return [*self.rows.values(), *self.columns.values()]

    def _split(self, values: Tensor) -> list[Tensor]:
        if self.index is None:
            return [values.index_select(0, index) for index in self.owned.values()]
        return list(values.split([len(index) for index in self.owned.values()]))

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        device = self.device
        self.owned = {owner: index.to(device) for owner, index in self.owned.items()}
        self.index = None if self.index is None else self.index.to(device)
        self.link()
        return self

    def link(self) -> None:
        """Tensors have moved: whoever writes the slices looks where they lie now."""
        self.linked = object()

    def extra_repr(self) -> str:
        kind = "columns" if self.axis else "rows"
        counts = ", ".join(f"{owner} {len(index)}" for owner, index in self.owned.items())
        return f"in={self.in_features}, out={self.out_features}, trained {kind}: {counts}"
